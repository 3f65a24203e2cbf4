"""search: a grid of settings, judged by cross-validation."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gradalign.cli import options as settings
from gradalign.cli.quiet import quiet
from gradalign.cli.runs import say_interrupted

if TYPE_CHECKING:
    from gradalign.multiexit.search import Trial

_SHOWN = 10


def add_commands(commands: settings.Commands) -> None:
    """Add the command."""
    found = commands.add_parser("search", help="try settings by cross-validation on the training rows of a GLUE task")
    found.add_argument(
        "--method", type=settings.method, default="gaml-soft", metavar="METHOD", help="(default: %(default)s)"
    )
    found.add_argument("--seed", type=int, default=0, help="of the runs and of the choice of trials (default: 0)")
    found.add_argument(
        "--grid",
        nargs="+",
        type=_axis,
        metavar="NAME=A,B",
        help="settings and their values, as learning_rate=2e-5,5e-5; the paper's grid of 180 if left out",
    )
    found.add_argument("--trials", type=int, metavar="N", help="try N of the grid at random")
    found.add_argument("--folds", type=int, default=5, metavar="K", help="parts of the training rows (default: 5)")
    found.add_argument("--out", type=Path, default=Path("runs/search"), help="folder; continued if it has some")
    settings.add_settings(found)
    found.set_defaults(command=_search)


def _search(options: argparse.Namespace) -> int:
    from gradalign.multiexit.configs import TextConfig
    from gradalign.multiexit.search import PAPERS_GRID, search, trials_of
    from gradalign.multiexit.training import Interrupted

    settings.check_alone("search")
    if options.task is None:
        raise ValueError("`--task` must name a GLUE task to search on, got none; give `--task sst-2`, say.")
    config = cast(TextConfig, settings.config_of(options, options.method, options.seed))
    trials = trials_of(_grid(options.grid) if options.grid else PAPERS_GRID, options.trials, options.seed)
    found = []
    try:
        with quiet(True):
            for trial in search(config, trials, options.folds, options.out, settings.device_of(options)):
                found.append(trial)
                print(_line(trial), flush=True)
    except Interrupted as stop:
        return say_interrupted(stop.step, "the same command")
    text = _table(found)
    (options.out / "search.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{options.out / 'trials.jsonl'}")
    return 0


def _grid(axes: Sequence[tuple[str, Sequence[Any]]]) -> Mapping[str, Sequence[Any]]:
    names = [name for name, _ in axes]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"`--grid` must name each setting once, got {', '.join(twice)} again; write NAME=A,B.")
    return dict(axes)


def _axis(text: str) -> tuple[str, Sequence[Any]]:
    name, equals, values = text.partition("=")
    name = name.replace("-", "_")
    if not equals or name not in settings.searchable():
        known = ", ".join(settings.searchable())
        raise argparse.ArgumentTypeError(f"must be NAME=A,B with a name of {known}, got {text!r}")
    kind = settings.type_of(name)
    try:
        return name, [kind(value) for value in values.split(",") if value]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must hold values of {name} after the =, got {text!r}") from error


def _line(trial: Trial) -> str:
    return f"trial {trial.number}: {_settings(trial.settings)}: {_score(trial.mean)}, {trial.seconds:.0f} s"


def _score(mean: float | None) -> str:
    return "diverged" if mean is None else f"{mean:.4f}"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _table(trials: Sequence[Trial]) -> str:
    best = sorted(trials, key=lambda trial: math.inf if trial.mean is None else -trial.mean)[:_SHOWN]
    lines = ["| trial | settings | mean of exits | of each fold | steps | seconds |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {t.number} | {_settings(t.settings)} | {_score(t.mean)} | {' '.join(f'{score:.4f}' for score in t.scores)}"
        f" | {t.steps:.0f} | {t.seconds:.0f} |"
        for t in best
    ]
    return "\n".join(lines) + "\n"
