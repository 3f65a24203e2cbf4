"""What decides how a run comes out: what all runs have, and what those on images have beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch

from gradalign.errors import check_seed, finite_number, flag, unknown_name
from gradalign.multiexit import methods
from gradalign.multiexit.methods import Settings
from gradalign.multiexit.objectives import check_count
from gradalign.multiexit.resnet import MultiExitResNet

GRANULARITIES = ("global", "layer", "tensor")
SCOPES = ("all", "trunk")
PRECISIONS = ("float32", "bfloat16")
_FOR_METHODS = tuple(f.name for f in fields(Settings))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every run has.

    Attributes:
        method: A name of ``methods.names()``.
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
        granularity: What shares a Gramian: "global", "layer" or "tensor".
        scope: Which parameters are aligned: "all", or the "trunk", those of no exit.
        precision: Of the network's arithmetic: "float32", or "bfloat16" by autocast.
        seed: Of initial weights, order, augmentation and dropout.
    """

    kind: ClassVar[str]

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
        for name in _FOR_METHODS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(method.defaults, name))
        self.check()

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
        flag("clamp", self.clamp)
        check_seed(self.seed)
        for name, known in (("granularity", GRANULARITIES), ("scope", SCOPES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        _ = self.settings

    @property
    def settings(self) -> Settings:
        """What the method takes."""
        return replace(methods.get(self.method).defaults, **{name: getattr(self, name) for name in _FOR_METHODS})

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with its kind, as ``config_of`` takes it."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Config):
    """A run of ``MultiExitResNet`` on images, by SGD.

    Attributes:
        data: "digits" or the path of an .npz file.
        depth: Of the ResNet, 6n + 2.
        exits: "block", "shallow-deep" or block numbers.
        learning_rate: After the warm-up and until 35 % of the steps; a tenth until 60 %, a hundredth until 85 %, a
            thousandth then.
        warm_up: Share of the steps in which the learning rate grows.
        momentum: Of SGD.
    """

    kind: ClassVar[str] = "images"

    data: str = "digits"
    depth: int = 56
    exits: str | tuple[int, ...] = "block"
    momentum: float = 0.9

    def check(self) -> None:
        """Raise TypeError or ValueError at the first setting that makes no sense."""
        super().check()
        check_count("depth", self.depth)
        for name in ("warm_up", "momentum"):
            finite_number(name, getattr(self, name), 0.0, 1.0)
        if isinstance(self.exits, list):
            object.__setattr__(self, "exits", tuple(self.exits))
        with torch.device("meta"):  # says what is wrong with depth and exits, and makes no weights
            MultiExitResNet(self.depth, exits=self.exits)

    def make_model(self, num_classes: int, in_channels: int) -> MultiExitResNet:
        """Return a new network; its weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return MultiExitResNet(self.depth, num_classes, in_channels, self.exits)


_KINDS: dict[str, type[Config]] = {ImageConfig.kind: ImageConfig}


def config_of(values: Mapping[str, Any], where: str) -> Config:
    """Return the configuration that ``to_dict`` gave.

    Args:
        values: What ``to_dict`` returned.
        where: Where they were read, for the error.

    Raises:
        ValueError: A setting is missing or unknown, or there is no such kind.
    """
    kind = _KINDS.get(values.get("kind", ""))
    if kind is None:
        raise ValueError(f"`config` must be of kind {' or '.join(_KINDS)}, got {values.get('kind')!r} in {where!r}.")
    known = {"kind", *(f.name for f in fields(kind))}
    if set(values) != known:
        odd = sorted(set(values) ^ known)
        raise ValueError(f"`config` must hold {', '.join(sorted(known))}, got {where!r} that differs in {odd}.")
    return kind(**{name: value for name, value in values.items() if name != "kind"})
