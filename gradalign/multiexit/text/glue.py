"""GLUE: a task's rows in three splits.

Shapes: N rows; labels (N,), int64 class numbers, or float32 scores for regression.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gradalign.errors import check_seed, finite_number, positive_integer
from gradalign.multiexit.text import tasks
from gradalign.multiexit.text.readers import TextSplit, read
from gradalign.multiexit.text.tasks import TASKS, Task, task

__all__ = ["TASKS", "Task", "TextData", "TextSplit", "load", "task"]


@dataclass(frozen=True, eq=False)
class TextData:
    """A task's rows in three splits.

    Attributes:
        task: The task.
        train: What the network learns from.
        held_out: A fixed random part of the training rows, for choosing.
        dev: The development rows, for the figures that are reported.
        skipped: How many short rows of QQP were left out, over both files; 0 for the other tasks.
    """

    task: Task
    train: TextSplit
    held_out: TextSplit
    dev: TextSplit
    skipped: int = 0


def load(
    task: str | Task,
    data_dir: str | Path | None = None,
    *,
    max_train: int | None = None,
    held_out: float = 0.15,
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
) -> TextData:
    """Return the rows of a task.

    Args:
        task: The task or its name.
        data_dir: A folder that holds one of, for SST-2: SST-2/train.tsv and dev.tsv (MNLI: dev_matched.tsv), or
            parts of them called train_subset.tsv and dev_subset.tsv, read by the names in their header;
            sst2/ as written by ``datasets.DatasetDict.save_to_disk``; or sst2/train-*.parquet and
            validation-*.parquet. None takes the rows from the hub, or its local cache.
        max_train: Take only so many rows of the training file, at random; the held-out rows are a part of them.
        held_out: Share of the training rows to hold out, in (0, 1); at least one row. Does nothing with ``folds``.
        folds: Cut the training rows into so many parts, at least 2, for cross-validation, and hold out one of them.
        fold: Which part is held out, from 0.
        seed: Makes both random choices. It is no run's seed: all runs share the choice.

    Raises:
        FileNotFoundError: The folder holds no such files; those looked for are named.
        ValueError: There is no such task, an argument is out of range, or a row is malformed; it is named.
        MissingExtraError: ``datasets`` is not installed, and the TSV files do not need it.
    """
    chosen = tasks.task(task)
    if not 0 < finite_number("held_out", held_out) < 1:
        raise ValueError(f"`held_out` must be in (0, 1), got {held_out!r}; 0.15 is usual.")
    if max_train is not None:
        positive_integer("max_train", max_train, low=2)
    generator = torch.Generator().manual_seed(check_seed(seed))
    whole, skipped = read(chosen, data_dir)
    order = torch.randperm(len(whole["train"]), generator=generator)[:max_train]
    if len(order) < 2:
        raise ValueError(
            f"`data_dir` must hold at least 2 training rows, one of them to be held out, got {len(order)}."
        )
    begin, end = _part(len(order), held_out, folds, fold)
    kept, held = torch.cat([order[:begin], order[end:]]).sort().values, order[begin:end].sort().values
    return TextData(chosen, whole["train"].pick(kept), whole["train"].pick(held), whole["dev"], skipped)


def _part(rows: int, held_out: float, folds: int | None, fold: int) -> tuple[int, int]:
    """Return where the held-out rows begin and end in the shuffled order."""
    if folds is None:
        return 0, min(max(1, round(held_out * rows)), rows - 1)
    if not 2 <= positive_integer("folds", folds) <= rows:
        raise ValueError(f"`folds` must be in 2..{rows}, a row a fold at least, got {folds}.")
    if not 0 <= fold < folds:
        raise ValueError(f"`fold` must be in 0..{folds - 1}, got {fold}.")
    return fold * rows // folds, (fold + 1) * rows // folds
