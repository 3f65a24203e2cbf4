"""Training methods by name: which losses a multi-exit network is trained on, and the rule that joins them.

Shapes: M exits, B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gradalign.errors import unknown_name
from gradalign.multiexit.objectives import mutual_distillation, weighted_cross_entropy
from gradalign.rules import Constant, GAHard, GASoft, Rule, Sum


@dataclass(frozen=True)
class Settings:
    """What the methods leave open.

    Attributes:
        alpha: Weight of the distillation loss, in [0, 1]; GAML-BERT, Eq. 2.
        temperature: Of the distillation, dimensionless, > 0.
        reduction: "sum" over the M (M - 1) ordered pairs of exits, as Eq. 3 is printed, or their "mean".
    """

    alpha: float = 0.3
    temperature: float = 1.0
    reduction: Literal["sum", "mean"] = "mean"


Objective = Callable[[Tensor, Tensor, Settings], dict[str, Tensor]]
"""Maps logits (M, B, C), labels (B,) and settings to the named losses."""


def cross_entropy(logits: Tensor, labels: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Return the weighted cross-entropy of all exits alone: GAML-BERT, Eq. 1."""
    return {"ce": weighted_cross_entropy(logits, labels)}


def mutual_learning(logits: Tensor, labels: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Return the weighted cross-entropy and the distillation among all exits: GAML-BERT, Eq. 1 and 3."""
    return {
        "ce": weighted_cross_entropy(logits, labels),
        "kd": mutual_distillation(logits, settings.temperature, settings.reduction),
    }


@dataclass(frozen=True)
class Method:
    """A way to train a multi-exit network.

    Attributes:
        name: Its name in the table.
        summary: What it does, in a line.
        objective: Makes the named losses.
        rule: Makes the rule that joins their gradients.
        defaults: What the settings are unless the user says otherwise.
    """

    name: str
    summary: str
    objective: Objective
    rule: Callable[[Settings], Rule]
    defaults: Settings = Settings()


_METHODS = (
    Method("joint", "cross-entropy of all exits (Eq. 1)", cross_entropy, lambda settings: Sum()),
    Method(
        "ml",
        "mutual learning: (1 - alpha) cross-entropy + alpha distillation (Eq. 2)",
        mutual_learning,
        lambda settings: Constant((1 - settings.alpha, settings.alpha)),
    ),
    Method(
        "gaml-soft",
        "mutual learning, distillation aligned by GA-soft (Eq. 6)",
        mutual_learning,
        lambda settings: GASoft(settings.alpha, anchor="ce"),
    ),
    Method(
        "gaml-hard",
        "mutual learning, distillation aligned by GA-hard (Eq. 7)",
        mutual_learning,
        lambda settings: GAHard(settings.alpha, anchor="ce"),
    ),
)

_TABLE = {method.name: method for method in _METHODS}


def names() -> list[str]:
    """Return the names of all methods.

    >>> names()
    ['joint', 'ml', 'gaml-soft', 'gaml-hard']
    """
    return list(_TABLE)


def get(name: str) -> Method:
    """Return the method of this name.

    Raises:
        ValueError: Unknown name; near ones are offered.

    >>> get("ml").rule(Settings(alpha=0.25))
    Constant(weights=(0.75, 0.25))
    """
    if name not in _TABLE:
        raise unknown_name("method", name, names())
    return _TABLE[name]
