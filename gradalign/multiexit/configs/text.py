"""What decides how a run on a GLUE task comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradalign.errors import flag, unknown_name
from gradalign.multiexit.configs.base import Config
from gradalign.multiexit.methods import Method
from gradalign.multiexit.objectives import check_count
from gradalign.multiexit.text import glue

EXITS = ("pooler", "linear", "mean", "fastbert", "deebert", "mix")


@dataclass(frozen=True, kw_only=True)
class TextConfig(Config):
    """A run of ``MultiExitEncoder`` on a GLUE task, by AdamW.

    Attributes:
        task: A name of ``glue.TASKS``.
        data_dir: The folder that holds the tasks' folders; None takes them from the hub.
        backbone: Name or path of the encoder.
        pretrained: Take the encoder's weights; False takes its configuration alone and draws new ones.
        exit: Kind of the exits, as ``MultiExitEncoder`` takes it; None becomes the method's own.
        max_length: Longest sequence, tokens; what is longer is cut.
        max_train: How many training rows to take, a fixed random part; None takes all.
        buckets: Put rows of like length in a batch.
        folds: Cut the training rows into so many parts and hold one out; None holds out 15 % of them.
        fold: Which part is held out, from 0.
        batch_size: Rows a step.
        learning_rate: Of AdamW, after the warm-up; it falls linearly to zero at the end of the stage.
        warm_up: For how many epochs the learning rate grows.
        weight_decay: Of AdamW, for matrices; vectors have none.
    """

    kind: ClassVar[str] = "text"

    task: str
    backbone: str
    data_dir: str | None = None
    pretrained: bool = True
    exit: str | None = None
    max_length: int = 128
    max_train: int | None = None
    buckets: bool = True
    folds: int | None = None
    fold: int = 0
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 2e-5
    warm_up: float = 1.0
    weight_decay: float = 0.01
    clip: float | None = 1.0
    patience: int | None = 5
    reduction: Literal["sum", "mean"] | None = None

    def check(self) -> None:
        """Raise TypeError or ValueError at the first setting that makes no sense."""
        super().check()
        object.__setattr__(self, "task", glue.task(self.task).name)
        if self.exit not in EXITS:
            raise unknown_name("exit", self.exit, EXITS)
        check_count("max_length", self.max_length)
        if self.max_train is not None:
            check_count("max_train", self.max_train)
        if self.folds is not None:
            check_count("folds", self.folds)
        if isinstance(self.fold, bool) or self.fold not in range(self.folds or 1):
            raise ValueError(f"`fold` must be in 0..{(self.folds or 1) - 1}, one of the folds, got {self.fold!r}.")
        flag("buckets", self.buckets)
        flag("pretrained", self.pretrained)

    def of_method(self, method: Method) -> dict[str, Any]:
        """Return what a method says of the settings that are left open."""
        return {**super().of_method(method), "exit": method.exit}

    @property
    def title(self) -> str:
        """What is trained on what, in a line."""
        return f"MultiExitEncoder of {self.backbone} on {self.task}, {self.epochs} epochs"

    @property
    def judged_on(self) -> str:
        """Whose rows a run's scores at its end are of: GLUE keeps the labels of its test rows to itself."""
        return "development"

    @property
    def run_name(self) -> str:
        """What one of several runs is told apart by."""
        fold = "" if self.folds is None else f" fold {self.fold + 1} of {self.folds}"
        return f"{self.method} on {self.task} seed {self.seed}{fold}"
