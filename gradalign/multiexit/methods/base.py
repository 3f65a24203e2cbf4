"""What a training method is: stages, each with its losses, the rule that joins them, and what of the network trains.

Shapes: M exits, B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, Protocol

from torch import Tensor, nn

from gradalign.errors import finite_number, flag, positive_integer, unknown_name
from gradalign.multiexit.inference import Inputs
from gradalign.rules import RowRule, Rule

REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class Settings:
    """What the methods leave open.

    Attributes:
        alpha: Weight of the distillation loss, in [0, 1]; GAML-BERT, Eq. 2.
        temperature: Of the distillation, dimensionless, > 0.
        reduction: "sum" over the M (M - 1) ordered pairs of exits, as Eq. 3 is printed, or their "mean".
        clamp: Let GA-soft stop at weight 0 where Eq. 6 would reverse the step.
        full_step: Let GA-hard take the whole gradient of the anchor where it drops the distillation, as Eq. 7 is
            printed; False takes 1 - alpha of it.
        pair_exit: The early exit of a pair, counted from 1; the other is the last.
        beta: Weight of the distance of hidden states in patient distillation, >= 0; Sun et al., Eq. 8.

    Raises:
        TypeError: A number is none, or a flag is not True or False.
        ValueError: A number is out of its range, or ``reduction`` is unknown.
    """

    alpha: float = 0.3
    temperature: float = 1.0
    reduction: Literal["sum", "mean"] = "mean"
    clamp: bool = False
    full_step: bool = True
    pair_exit: int = 1
    beta: float = 100.0

    def __post_init__(self) -> None:
        finite_number("alpha", self.alpha, 0.0, 1.0)
        if finite_number("temperature", self.temperature) <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature!r}.")
        if self.reduction not in REDUCTIONS:
            raise unknown_name("reduction", self.reduction, REDUCTIONS)
        flag("clamp", self.clamp)
        flag("full_step", self.full_step)
        positive_integer("pair_exit", self.pair_exit)
        finite_number("beta", self.beta, 0.0)


@dataclass(frozen=True, eq=False)
class Step:
    """What an objective makes its losses of, at one training step.

    Attributes:
        logits: What the stage's ``forward`` gave: (M, B, C), floating, or fewer exits where it runs fewer.
        labels: (B,), integer; floating for regression.
        settings: What the method leaves open.
        number: How many steps of the stage are done.
        epoch: Of the stage, counted from 1.
        epochs: How many the stage has.
        memory: Tensors by name that the objective keeps from step to step; it may write into the mapping, which goes
            into checkpoints.
        model: The network in training.
        inputs: What it was run on.
        teacher: The network as the stage before left it, frozen and in evaluation mode; None unless the stage
            ``has_teacher``.
        states: What the stage's ``forward`` gave beside the logits, None where it gave these alone.
    """

    logits: Tensor
    labels: Tensor
    settings: Settings = Settings()
    number: int = 0
    epoch: int = 1
    epochs: int = 1
    memory: dict[str, Tensor] = field(default_factory=dict)
    model: nn.Module | None = None
    inputs: Inputs | None = None
    teacher: nn.Module | None = None
    states: Tensor | None = None


Objective = Callable[[Step], dict[str, Tensor]]
"""Makes the named losses of a step."""


def run(model: nn.Module, inputs: Inputs, settings: Settings) -> Tensor:
    """Return the logits of all exits, (M, B, C)."""
    logits: Tensor = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return logits


def everything(model: nn.Module) -> Iterable[nn.Parameter]:
    """Return all parameters of a network."""
    return model.parameters()


def unchanged(model: nn.Module, settings: Settings) -> nn.Module:
    """Return the network as it is."""
    return model


@dataclass(frozen=True)
class Stage:
    """A part of a training run, with an optimizer and a schedule of its own.

    Attributes:
        objective: Makes the named losses.
        rule: Makes the rule that joins their gradients.
        trains: Names the parameters that train. The others are frozen, and modules that hold none of those that train
            are in evaluation mode: without dropout, their normalisation's statistics as they were.
        forward: Runs the network and returns logits: (M, B, C), or those of the exits that the losses need; or a pair
            of them and of ``states``, which the step then holds.
        prepare: Makes the network of this stage of that of the stage before; for a first stage, of a new one.
        has_teacher: Keep the network as the stage before left it, frozen, as the steps' teacher.
        begins_anew: Give ``prepare`` the network that the run began with in place of that of the stage before.
        epochs: Of the stage, in units of the run's.
        learning_rate: Of the stage, in units of the run's.
        judged: Which exits' score on held-out rows says when training stops early: the "mean" of all, the "last", the
            "early" one of the settings' pair, or the mean of the "pair".
    """

    objective: Objective
    rule: Callable[[Settings], Rule | RowRule]
    trains: Callable[[nn.Module], Iterable[nn.Parameter]] = everything
    forward: Callable[[nn.Module, Inputs, Settings], Tensor | tuple[Tensor, Tensor]] = run
    prepare: Callable[[nn.Module, Settings], nn.Module] = unchanged
    has_teacher: bool = False
    begins_anew: bool = False
    epochs: float = 1.0
    learning_rate: float = 1.0
    judged: Literal["mean", "last", "early", "pair"] = "mean"

    def judge(self, scores: Sequence[float], settings: Settings) -> float:
        """Return the number that says when training stops early, of every exit's score."""
        early = settings.pair_exit - 1
        exits = {"mean": range(len(scores)), "last": (-1,), "early": (early,), "pair": (early, -1)}[self.judged]
        return fmean(scores[exit] for exit in exits)


class Judged(Protocol):
    """What ``Method.finish`` is given of a run's ``Workload``."""

    main: str
    steps_an_epoch: int

    def batch(self, step: int, rank: int, ranks: int, /) -> tuple[Inputs, Tensor, float]:
        """Return a step's batch: inputs, labels and the share of the batch's rows, 1 where ``ranks`` is."""

    def logits(self, model: nn.Module, split: Literal["held_out"], /) -> tuple[Tensor, Tensor]:
        """Return the logits of every exit on the held-out rows, (M, N, C), and the labels, (N,)."""

    def scores(self, logits: Tensor, labels: Tensor, /) -> dict[str, Tensor]:
        """Return each score by name, (M,)."""


def untouched(model: nn.Module, work: Judged) -> nn.Module:
    """Return the network as it is."""
    return model


@dataclass(frozen=True)
class Method:
    """A way to train a network with exits.

    Attributes:
        name: Its name in the table.
        summary: What it does, in a line.
        stages: What is done, one after the other.
        defaults: What the settings are unless the user says otherwise.
        finish: Makes the network that is kept of the one that was trained; it may look at the run's rows.
        kinds: What it can be used on: "images", "text".
        exit: The kind of an encoder's exits unless the user says otherwise, a key of ``text.heads.KINDS``.
    """

    name: str
    summary: str
    stages: tuple[Stage, ...]
    defaults: Settings = Settings()
    finish: Callable[[nn.Module, Judged], nn.Module] = untouched
    kinds: tuple[str, ...] = ("images", "text")
    exit: str = "pooler"
