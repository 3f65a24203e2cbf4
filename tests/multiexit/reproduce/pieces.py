"""What the pieces on text are tried with."""

from __future__ import annotations

from dataclasses import replace

PIECES = {  # with what each is tried
    "table1": {},
    "table2": {"methods": ("single", "joint", "ml", "deebert", "bert-6l"), "tasks": ("SST2", "mrpc")},
    "table3": {},
    "table4": {"methods": ("single", "joint", "fastbert")},
    "table5": {},
    "figure3": {"methods": ("ml", "gaml-soft")},
    "figure4": {"methods": ("joint",)},
    "figure5": {},
}


def order_of(text, name):
    return replace(text, **PIECES[name])
