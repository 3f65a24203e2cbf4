"""What decides how a run comes out, whatever it is trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from gradalign.errors import check_seed, finite_number, unknown_name
from gradalign.multiexit import methods
from gradalign.multiexit.methods import Method, Settings
from gradalign.multiexit.objectives import check_count

GRANULARITIES = ("global", "layer", "tensor")
SCOPES = ("all", "trunk")
PRECISIONS = ("float32", "bfloat16")
_FOR_METHODS = tuple(f.name for f in fields(Settings))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every run has.

    Attributes:
        method: A name of ``methods.names()`` or ``methods.rule_names()``.
        epochs: Passes over the training rows, in each stage of the method the number that the stage multiplies.
        batch_size: Rows a step.
        learning_rate: The largest of the schedule.
        warm_up: How long the learning rate grows linearly; the unit is the kind's.
        weight_decay: Of the optimizer.
        clip: Largest norm of the aligned gradient, to which it is scaled down; None leaves it.
        patience: Stop a stage after so many epochs without a better score on held-out rows, and keep the best network;
            None trains to the end and keeps the last.
        alpha: Weight of the distillation loss; None, here and below, becomes the method's own default.
        temperature: Of the distillation.
        reduction: "sum" or "mean" over pairs of exits.
        clamp: Whether GA-soft stops at weight 0.
        full_step: Whether GA-hard takes the whole gradient of the anchor where it drops the distillation.
        pair_exit: The early exit of the methods that train a pair of exits, counted from 1.
        beta: Weight of the distance of hidden states in patient distillation.
        granularity: What shares a Gramian: "global", "layer" or "tensor".
        scope: Which parameters are aligned: "all", or the "trunk", those of no exit.
        precision: Of the network's arithmetic: "float32", or "bfloat16" by autocast.
        seed: Of initial weights, order, augmentation and dropout.
    """

    kind: ClassVar[str]
    _own: ClassVar[tuple[str, ...]]  # the settings that were left open; each configuration's own, but no field

    method: str = "gaml-soft"
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1
    warm_up: float = 0.1
    weight_decay: float = 1e-4
    clip: float | None = None
    patience: int | None = None
    alpha: float | None = None
    temperature: float | None = None
    reduction: Literal["sum", "mean"] | None = None
    clamp: bool | None = None
    full_step: bool | None = None
    pair_exit: int | None = None
    beta: float | None = None
    granularity: Literal["global", "layer", "tensor"] = "global"
    scope: Literal["all", "trunk"] = "all"
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        method = methods.get(self.method)
        if self.kind not in method.kinds:
            raise ValueError(
                f"`method` must be one for {self.kind}, got {self.method!r}, which is for {' and '.join(method.kinds)};"
                f" take one of {', '.join(methods.names(self.kind))}."
            )
        own = {name: value for name, value in self.of_method(method).items() if getattr(self, name) is None}
        for name, value in own.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_own", tuple(own))  # another method would say otherwise
        self.check()

    def of_method(self, method: Method) -> dict[str, Any]:
        """Return what a method says of the settings that are left open."""
        return {name: getattr(method.defaults, name) for name in _FOR_METHODS}

    def with_method(self, method: str, seed: int) -> Self:
        """Return the same for another method and seed; what was left open is that method's own."""
        open_again: dict[str, Any] = dict.fromkeys(self._own)
        return replace(self, method=method, seed=seed, **open_again)

    def check(self) -> None:
        """Raise TypeError or ValueError at the first setting that makes no sense."""
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "weight_decay", "warm_up"):
            finite_number(name, getattr(self, name), low=0.0)
        if self.clip is not None and finite_number("clip", self.clip) <= 0:
            raise ValueError(f"`clip` must be positive, got {self.clip!r}; leave it out to clip nothing.")
        if self.patience is not None:
            check_count("patience", self.patience)
        check_seed(self.seed)
        for name, known in (("granularity", GRANULARITIES), ("scope", SCOPES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        _ = self.settings

    @property
    def title(self) -> str:
        """What is trained on what, in a line."""
        raise NotImplementedError

    @property
    def judged_on(self) -> str:
        """Whose rows a run's scores at its end are of, as this kind of data calls them."""
        return "test"

    @property
    def run_name(self) -> str:
        """What one of several runs is told apart by."""
        return f"{self.method} seed {self.seed}"

    @property
    def settings(self) -> Settings:
        """What the method takes."""
        return replace(methods.get(self.method).defaults, **{name: getattr(self, name) for name in _FOR_METHODS})

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with its kind, as ``config_of`` takes it."""
        return {"kind": self.kind, **asdict(self)}
