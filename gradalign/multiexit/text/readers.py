"""Rows of GLUE from TSV files or from what the Hugging Face hub holds.

Shapes: N rows; labels (N,), int64 class numbers, or float32 scores for regression. Texts are kept as the source has
them, with no trimming.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradalign.errors import missing_extra
from gradalign.multiexit.text.tasks import Task

_HUB = "nyu-mll/glue"


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Some of the rows.

    Attributes:
        first: N texts.
        second: The other text of each pair; None for a task of single texts.
        labels: (N,), int64; float32 for regression.
    """

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    labels: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def pick(self, rows: Tensor) -> TextSplit:
        """Return the rows (n,), int64, in that order."""
        numbers = rows.tolist()
        second = None if self.second is None else tuple(self.second[k] for k in numbers)
        return TextSplit(tuple(self.first[k] for k in numbers), second, self.labels[rows])


def read(task: Task, data_dir: str | Path | None) -> tuple[dict[str, TextSplit], int]:
    """Return the splits "train" and "dev", and how many rows were skipped."""
    if data_dir is None:
        return _from_hub_format(task, _datasets().load_dataset(_HUB, task.hub_config), _HUB), 0
    folder, copy = Path(data_dir) / task.folder, Path(data_dir) / task.hub_config
    names = {
        "train": ("train.tsv", "train_subset.tsv"),
        "dev": tuple(dict.fromkeys((f"{task.dev}.tsv", "dev.tsv", "dev_subset.tsv"))),
    }
    found = {part: next((folder / name for name in names[part] if (folder / name).is_file()), None) for part in names}
    paths = {part: path for part, path in found.items() if path}
    if len(paths) == len(names):
        rows = {part: _from_tsv(task, path) for part, path in paths.items()}
        return {part: split for part, (split, _) in rows.items()}, sum(skipped for _, skipped in rows.values())
    if (copy / "dataset_dict.json").is_file():
        return _from_hub_format(task, _datasets().load_from_disk(str(copy)), str(copy)), 0
    parquet = {name: sorted(copy.glob(f"{name}-*.parquet")) for name in task.splits.values()}
    if all(parquet.values()):
        return _from_hub_format(task, {name: _parquet(files) for name, files in parquet.items()}, str(copy)), 0
    raise FileNotFoundError(
        f"`data_dir` must hold the rows of {task.name}, got {str(data_dir)!r} with neither"
        f" {task.folder}/{' or '.join(names['train'])} and {' or '.join(names['dev'])}, nor"
        f" {task.hub_config}/dataset_dict.json, nor {task.hub_config}/"
        f"{' and '.join(f'{name}-*.parquet' for name in parquet)}; leave it out to take them from the hub."
    )


def _from_tsv(task: Task, path: Path) -> tuple[TextSplit, int]:
    """Return the rows of a file, and how many short ones were skipped."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"`data_dir` must hold UTF-8 text, got {path} that is none: {error}.") from error
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    if rows[-1] == [""]:  # what follows the last line end
        rows.pop()
    header = task.header or (rows.pop(0) if rows else [])
    start = 1 if task.header else 2  # the number of the first row's line
    label_column = next((name for name in task.label_columns if name in header), None)
    if label_column is None or not set(task.columns) <= set(header):
        wanted = ", ".join((*task.columns, " or ".join(task.label_columns)))
        raise ValueError(f"`data_dir` must hold {path.name} with the columns {wanted}, got {path} with {header}.")
    fields, at = [header.index(name) for name in task.columns], header.index(label_column)
    kept: list[list[str]] = []
    labels: list[float] = []
    for number, row in enumerate(rows, start):
        if task.ragged and len(row) < len(header):
            continue
        if len(row) != len(header):
            raise _malformed(f"{path}:{number}", f"{len(row)} columns", f"{len(header)} columns, divided by tabs")
        kept.append([row[k] for k in fields])
        labels.append(_label(task, row[at], f"{path}:{number}"))
        _check_texts(task, kept[-1], f"{path}:{number}")
    return _split(task, kept, labels, str(path)), len(rows) - len(kept)


def _label(task: Task, text: str, where: str) -> float:
    """Return the label that a TSV file writes as ``text``."""
    if task.labels is None:
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise _malformed(where, f"the score {text!r}", "a finite number")
        return score
    names = task.labels if task.words else tuple(str(k) for k in range(task.num_classes))
    if text not in names:
        raise _malformed(where, f"the label {text!r}", f"one of {', '.join(names)}")
    return names.index(text)


def _check_texts(task: Task, texts: Sequence[str], where: str) -> None:
    if not task.ragged and not all(text.strip() for text in texts):
        raise _malformed(where, "an empty text", "text in every field")


def _malformed(where: str, got: str, wanted: str) -> ValueError:
    return ValueError(f"`data_dir` must hold well-formed rows, got {where} with {got}; mend or remove it: {wanted}.")


def _split(task: Task, texts: Sequence[Sequence[str]], labels: Sequence[float], where: str) -> TextSplit:
    """Return the split made of N rows of one or two texts and their labels."""
    if not texts:
        raise ValueError(f"`data_dir` must hold at least one row, got {where} with none.")
    columns = list(zip(*texts, strict=True))
    dtype = torch.float32 if task.labels is None else torch.int64
    return TextSplit(columns[0], columns[1] if len(columns) > 1 else None, torch.tensor(labels, dtype=dtype))


def _datasets() -> Any:  # noqa: ANN401 (a module that ships no types)
    try:
        import datasets  # noqa: PLC0415 (seconds to import, and the TSV files do not need it)
    except ImportError as error:
        raise missing_extra("datasets", "text") from error
    return datasets


def _parquet(files: Sequence[Path]) -> Any:  # noqa: ANN401
    with tempfile.TemporaryDirectory() as cache:  # a second copy in the user's cache would serve nobody
        paths = [str(path) for path in files]
        return _datasets().Dataset.from_parquet(paths, cache_dir=cache, keep_in_memory=True)


def _from_hub_format(task: Task, splits: Mapping[str, Any], source: str) -> dict[str, TextSplit]:
    """Return the splits "train" and "dev" of a ``DatasetDict``."""
    lacking = [name for name in task.splits.values() if name not in splits]
    if lacking:
        raise ValueError(f"`data_dir` must hold the split {' and '.join(lacking)}, got {source} without.")
    return {part: _from_dataset(task, splits[name], f"{source} {name}") for part, name in task.splits.items()}


def _from_dataset(task: Task, rows: Any, source: str) -> TextSplit:  # noqa: ANN401 (datasets.Dataset)
    wanted = (*task.fields, "label")
    if not set(wanted) <= set(rows.column_names):
        raise ValueError(
            f"`data_dir` must hold the fields {', '.join(wanted)}, got {source} with {', '.join(rows.column_names)}."
        )
    names = getattr(rows.features["label"], "names", None)
    if names is not None and tuple(names) != task.labels:
        raise ValueError(f"`data_dir` must number the labels {task.labels}, got {source} with {tuple(names)}.")
    texts = list(zip(*(rows[field][:] for field in task.fields), strict=True))
    labels = rows["label"][:]
    for number, (row, label) in enumerate(zip(texts, labels, strict=True)):
        where = f"{source}:{number}"
        if any(text is None for text in row):
            raise _malformed(where, "no text", "text in every field")
        _check_texts(task, row, where)
        if label is None or not math.isfinite(label):
            raise _malformed(where, f"the label {label!r}", "a finite number")
        if task.labels is not None and label not in range(task.num_classes):
            raise _malformed(where, f"the label {label!r}", f"an integer in 0..{task.num_classes - 1}")
    return _split(task, texts, labels, source)
