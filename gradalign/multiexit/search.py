"""Search for settings by cross-validation on the training rows, so that the development rows stay unseen."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradalign.errors import check_seed
from gradalign.multiexit.attempts import attempt
from gradalign.multiexit.configs import TextConfig
from gradalign.multiexit.files import replace_file
from gradalign.multiexit.objectives import check_count
from gradalign.multiexit.runs import Run
from gradalign.multiexit.text.workload import MODEL

PAPERS_GRID: Mapping[str, Sequence[Any]] = {
    "batch_size": (16, 32, 128),
    "learning_rate": (1e-5, 2e-5, 3e-5, 5e-5),
    "warm_up": (0.8, 1.0, 1.2),
    "alpha": (0.1, 0.2, 0.3, 0.5, 0.8),
}
"""The grid of GAML-BERT, section 6.4."""


@dataclass(frozen=True)
class Trial:
    """A setting and what it came to.

    Attributes:
        number: From 0, in the order of the search.
        settings: The fields of the grid.
        scores: The main score on held-out rows, mean over the exits, of each fold that did not diverge.
        mean: Over the folds; None where one diverged.
        seconds: Of training, all folds.
        steps: Mean over the folds.
    """

    number: int
    settings: Mapping[str, Any]
    scores: Sequence[float]
    mean: float | None
    seconds: float
    steps: float


def trials_of(grid: Mapping[str, Sequence[Any]], trials: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Return the settings to try, all of the grid or so many of them at random.

    Raises:
        ValueError: The grid is empty, or ``trials`` below 1.

    >>> trials_of({"alpha": [0.1, 0.3], "batch_size": [32]})
    [{'alpha': 0.1, 'batch_size': 32}, {'alpha': 0.3, 'batch_size': 32}]
    """
    empty = [name for name, values in grid.items() if not values]
    if empty or not grid:
        raise ValueError(f"`grid` must hold one value at least for each setting, got none for {empty or 'any'}.")
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if trials is None or check_count("trials", trials) >= len(every):
        return every
    return random.Random(check_seed(seed)).sample(every, trials)


def search(
    config: TextConfig,
    settings: Sequence[Mapping[str, Any]],
    folds: int,
    folder: Path,
    device: torch.device | str = "cpu",
) -> Iterator[Trial]:
    """Train each setting on each fold's training rows, and yield what it came to; trials.jsonl has a row a trial.

    What a folder holds already is taken as it is, or continued: so a search that was stopped goes on. Networks and
    checkpoints of finished runs are removed, for a search makes hundreds. With patience a fold's held-out rows choose
    the epoch as well as judge it, alike for every setting.

    Args:
        config: What all runs share.
        settings: What is changed in each trial, as ``trials_of`` returns it.
        folds: Into how many parts the training rows are cut; each is held out once.
        folder: Holds a folder for each trial and fold.
        device: Where to compute.

    Raises:
        ValueError: A setting makes no sense, or the folder holds another search.
        Interrupted: Ctrl-C; the same call goes on.
    """
    if check_count("folds", folds) < 2:
        raise ValueError(f"`folds` must be at least 2, got {folds}.")
    configs = [[replace(config, **one, folds=folds, fold=fold) for fold in range(folds)] for one in settings]
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Trial] = []
    for number, (of_trial, changed) in enumerate(zip(configs, settings, strict=True)):
        runs = [_trained(folder / f"trial-{number:03}" / f"fold-{c.fold}", c, device) for c in of_trial]
        results = [run.result for run in runs if run.finished]
        scores = [statistics.fmean(result[f"held_out_{result['main']}"]) for result in results]
        found.append(
            Trial(
                number,
                dict(changed),
                scores,
                statistics.fmean(scores) if len(scores) == folds else None,
                sum(result["seconds"] for result in results),
                statistics.fmean(result["steps"] for result in results) if results else 0.0,
            )
        )
        _write(folder / "trials.jsonl", found)
        yield found[-1]


def _trained(folder: Path, config: TextConfig, device: torch.device | str) -> Run:
    run = Run(folder).prepared(config)
    if attempt(run, device):
        run.drop_checkpoint()
        shutil.rmtree(folder / MODEL, ignore_errors=True)
    return run


def _write(path: Path, found: Sequence[Trial]) -> None:
    lines = "".join(json.dumps(asdict(trial)) + "\n" for trial in found)
    replace_file(path, lambda new: new.write_text(lines, encoding="utf-8"))
