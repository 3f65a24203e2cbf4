"""The options that the benchmarks share, and where their results go."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from provenance import write


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark.

    Args:
        description: The script's docstring.
        rounds: How many rounds a full run takes.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="small and few: to see that it runs, not to be quoted")
    made.add_argument("--rounds", type=int, help=f"default {rounds}, at most {QUICK_ROUNDS} with --quick")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--out", type=Path, metavar="DIR", help="write results as JSON, and plots, into this folder")
    made.set_defaults(full_rounds=rounds)
    return made


QUICK_ROUNDS = 2

# Left to itself, glibc gives freed pages back to the system and takes new, zeroed ones at the next step, or not, as
# what a process did before has it: the same step then takes five or ten per cent more or less, whoever takes it.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**30)}


def keep_freed_memory() -> None:
    """Start this script again where the C library would not keep freed memory; of no effect but on Linux."""
    if sys.platform == "linux" and not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})


def rounds(options: argparse.Namespace) -> int:
    """Return how many rounds to take."""
    return options.rounds or min(options.full_rounds, QUICK_ROUNDS if options.quick else options.full_rounds)


def show(recorded: Mapping[str, object]) -> None:
    """Print how and on what is measured."""
    for key, value in recorded.items():
        shown = ", ".join(f"{name} {said}" for name, said in value.items()) if isinstance(value, Mapping) else value
        print(f"{key}: {shown}")


def target(options: argparse.Namespace, name: str) -> Path | None:
    """Return where results go, without a suffix, or None: the device's kind is in the name unless it is the CPU."""
    if options.out is None:
        return None
    options.out.mkdir(parents=True, exist_ok=True)
    kind = torch.device(options.device).type
    return options.out / (name if kind == "cpu" else f"{name}-{kind}")


def save(options: argparse.Namespace, name: str, results: Mapping[str, object]) -> Path | None:
    """Write the results where asked, and return where a plot of them goes."""
    place = target(options, name)
    if place is None:
        return None
    write(place.with_suffix(".json"), results)
    return place.with_suffix(".png")
