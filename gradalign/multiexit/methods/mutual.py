"""Joint training, mutual learning, and mutual learning with aligned gradients: the methods of the GAML-BERT paper."""

from __future__ import annotations

from torch import Tensor

from gradalign.multiexit.methods.base import Method, Stage, Step
from gradalign.multiexit.objectives import mutual_distillation, weighted_loss
from gradalign.rules import Constant, GAHard, GASoft, Sum


def cross_entropy(step: Step) -> dict[str, Tensor]:
    """Return the weighted loss of all exits alone: GAML-BERT, Eq. 1, with squared errors for regression."""
    return {"ce": weighted_loss(step.logits, step.labels)}


def mutual_learning(step: Step) -> dict[str, Tensor]:
    """Return the weighted loss of all exits and the distillation among them: GAML-BERT, Eq. 1 and 3."""
    settings = step.settings
    return {
        "ce": weighted_loss(step.logits, step.labels),
        "kd": mutual_distillation(step.logits, settings.temperature, settings.reduction),
    }


METHODS = (
    Method("joint", "cross-entropy of all exits (Eq. 1)", (Stage(cross_entropy, lambda settings: Sum()),)),
    Method(
        "ml",
        "mutual learning: (1 - alpha) cross-entropy + alpha distillation (Eq. 2)",
        (Stage(mutual_learning, lambda settings: Constant((1 - settings.alpha, settings.alpha))),),
    ),
    Method(
        "gaml-soft",
        "mutual learning, distillation aligned by GA-soft (Eq. 6)",
        (Stage(mutual_learning, lambda settings: GASoft(settings.alpha, settings.clamp, anchor="ce")),),
    ),
    Method(
        "gaml-hard",
        "mutual learning, distillation aligned by GA-hard (Eq. 7)",
        (Stage(mutual_learning, lambda settings: GAHard(settings.alpha, settings.full_step, anchor="ce")),),
    ),
)
