"""The GLUE tasks: their files, fields, labels and scores."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gradalign.errors import unknown_name


@dataclass(frozen=True)
class Task:
    """What is fixed about a task.

    Attributes:
        name: As the table ``TASKS`` has it.
        folder: Of the classic TSV files.
        hub_config: The hub's name, also the folder of a local copy in the hub's format.
        fields: The hub's one or two fields of text.
        columns: The header's names of the same in the TSV files.
        labels: Class names, numbered as the hub numbers them; None for regression.
        metrics: Names of the scores; the last is the one number that tables give.
        label_columns: Possible header names of the label, of which a file has the first that it has.
        header: The columns, where the TSV files have no header line.
        words: The TSV files write the class names; otherwise the class numbers.
        dev: Name of the TSV development file without its suffix; the hub says "validation" for "dev".
        ragged: The official files hold rows cut in two by a line end, which the official readers skip, and empty
            texts, which they keep; for the other tasks both are errors.
    """

    name: str
    folder: str
    hub_config: str
    fields: tuple[str, ...]
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    label_columns: tuple[str, ...] = ("label",)
    header: tuple[str, ...] | None = None
    words: bool = False
    dev: str = "dev"
    ragged: bool = False

    @property
    def num_classes(self) -> int:
        """C; 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def main(self) -> str:
        """The score that tables give."""
        return self.metrics[-1]

    @property
    def splits(self) -> dict[str, str]:
        """The hub's names of the training and the development rows."""
        return {"train": "train", "dev": self.dev.replace("dev", "validation")}


_SENTENCES = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
_TASKS = (
    Task(
        "cola",
        "CoLA",
        "cola",
        ("sentence",),
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("accuracy", "matthews"),
        header=("source", "label", "mark", "sentence"),
    ),
    Task("sst-2", "SST-2", "sst2", ("sentence",), ("sentence",), ("negative", "positive"), ("accuracy",)),
    Task(
        "mrpc",
        "MRPC",
        "mrpc",
        _SENTENCES,
        ("#1 String", "#2 String"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1", "accuracy_and_f1"),
        label_columns=("Quality",),
    ),
    Task(
        "qqp",
        "QQP",
        "qqp",
        ("question1", "question2"),
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1", "accuracy_and_f1"),
        label_columns=("is_duplicate",),
        ragged=True,
    ),
    Task(
        "mnli",
        "MNLI",
        "mnli",
        ("premise", "hypothesis"),
        _SENTENCES,
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        label_columns=("gold_label", "label"),
        words=True,
        dev="dev_matched",
    ),
    Task(
        "qnli", "QNLI", "qnli", ("question", "sentence"), ("question", "sentence"), _ENTAILED, ("accuracy",), words=True
    ),
    Task("rte", "RTE", "rte", _SENTENCES, _SENTENCES, _ENTAILED, ("accuracy",), words=True),
    Task(
        "sts-b",
        "STS-B",
        "stsb",
        _SENTENCES,
        _SENTENCES,
        None,
        ("pearson", "spearman", "pearson_and_spearman"),
        label_columns=("score",),
    ),
    Task("wnli", "WNLI", "wnli", _SENTENCES, _SENTENCES, ("not_entailment", "entailment"), ("accuracy",)),
)
TASKS: dict[str, Task] = {each.name: each for each in _TASKS}
"""The tasks by name."""


def task(name: str | Task) -> Task:
    """Return the task called ``name``, capitals and hyphens aside; a task is returned as it is.

    Raises:
        ValueError: There is no such task; the nearest names are offered.

    >>> task("SST2").folder, task("STS-B").num_classes
    ('SST-2', 1)
    """
    if isinstance(name, Task):
        return name
    for each in _TASKS:
        if re.sub(r"[-_ ]", "", str(name)).lower() == each.hub_config:
            return each
    raise unknown_name("task", name, TASKS)
