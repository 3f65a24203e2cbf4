"""reproduce: the paper's tables and figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradalign.cli import options as settings
from gradalign.cli.quiet import quiet
from gradalign.cli.runs import say_interrupted

_NAMES = ("table1", "table2", "table3", "table4", "table5", "table8", "figure3", "figure4", "figure5")


def add_commands(commands: settings.Commands) -> None:
    """Add the command."""
    again = commands.add_parser("reproduce", help="run a table or figure of the paper, on your backbone and data")
    again.add_argument("name", choices=_NAMES, help="of the GAML-BERT paper; table8 is on images")
    again.add_argument("--tasks", nargs="+", metavar="TASK", help="GLUE tasks; the paper's if left out")
    again.add_argument(
        "--methods", nargs="+", type=settings.method, metavar="METHOD", help="methods; the paper's if left out"
    )
    again.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1")
    again.add_argument(
        "--out", type=Path, default=Path("runs/reproduce"), help="folder of runs and results; continued if it has some"
    )
    again.add_argument("--no-train", action="store_true", help="make it of the runs that are finished")
    settings.add_settings(again, task=False)
    again.set_defaults(command=_reproduce)


def _reproduce(options: argparse.Namespace) -> int:
    from gradalign.multiexit.reproduce import PIECES, Order, reproduce
    from gradalign.multiexit.training import Interrupted

    settings.check_alone("reproduce")
    if options.seeds < 1:
        raise ValueError(f"`--seeds` must be at least 1, got {options.seeds}.")
    kind = PIECES[options.name].kind
    order = Order(
        options.out,
        options.tasks or (),
        options.methods or (),
        range(options.seeds),
        settings.checked(options, kind),
        settings.device_of(options),
    )
    try:
        with quiet(kind == "text"):
            files = reproduce(options.name, order, training=not options.no_train)
    except Interrupted as stop:
        return say_interrupted(stop.step, "the same command")
    print(files[0].read_text(encoding="utf-8"))
    for path in files:
        print(path)
    return 0
