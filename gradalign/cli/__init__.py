"""The command line: train, compare, evaluate, search, and reproduce the paper's tables and figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from gradalign import __version__
from gradalign.cli import export, reproduce, runs, search
from gradalign.cli.options import Parser
from gradalign.errors import GradAlignError, MissingExtraError

_CLOSED = 141  # what a shell reports of a command that wrote to a closed pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        status = int(options.command(options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("gradalign: stopped; a run goes on from its last checkpoint", file=sys.stderr)
        return runs.INTERRUPTED
    except BrokenPipeError:  # head, say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return _CLOSED
    except (GradAlignError, MissingExtraError, ValueError, OSError) as error:
        print(f"gradalign: {error}", file=sys.stderr)
        return 1


def _parser() -> Parser:
    parser = Parser(prog="gradalign", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gradalign {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs.add_commands(commands)
    export.add_commands(commands)
    search.add_commands(commands)
    reproduce.add_commands(commands)
    return parser
