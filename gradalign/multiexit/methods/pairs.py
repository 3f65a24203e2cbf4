"""Two exits alone, an early one and the last: the pilot study of GAML-BERT, Table 1, in its five settings.

Exit i is the settings' ``pair_exit``, exit M the last. Each loss counts once, CE_i + CE_M; distillation joins it by
the weights of Eq. 2, (1 - alpha) and alpha.
"""

from __future__ import annotations

from torch import Tensor, nn

from gradalign.multiexit.inference import Inputs
from gradalign.multiexit.methods.base import Method, Settings, Stage, Step
from gradalign.multiexit.methods.frozen import last_loss
from gradalign.multiexit.methods.networks import layered, some_exits
from gradalign.multiexit.methods.taught import weighted_sum
from gradalign.multiexit.objectives import distillation, exit_losses, mutual_distillation
from gradalign.rules import Sum


def early_exit_alone(model: nn.Module, inputs: Inputs, settings: Settings) -> Tensor:
    """Return the logits of exit i alone, (1, B, C); no layer after it is run."""
    if settings.pair_exit > layered(model).num_exits:
        raise ValueError(
            f"`pair_exit` must be in 1..{layered(model).num_exits}, the number of exits, got {settings.pair_exit}."
        )
    return some_exits(model, inputs, (settings.pair_exit,))


def both(model: nn.Module, inputs: Inputs, settings: Settings) -> Tensor:
    """Return the logits of exits i and M, (2, B, C)."""
    last = layered(model).num_exits
    if settings.pair_exit >= last:
        raise ValueError(f"`pair_exit` must be an exit before the last, {last}, got {settings.pair_exit}.")
    return some_exits(model, inputs, (settings.pair_exit, last))


def joint(step: Step) -> dict[str, Tensor]:
    """Return CE_i + CE_M."""
    return {"ce": exit_losses(step.logits, step.labels).sum()}


def early_learns(step: Step) -> dict[str, Tensor]:
    """Return the joint loss, and as ``kd`` what exit M teaches exit i."""
    return joint(step) | {"kd": _taught(step.logits[0], step.logits[1], step)}


def late_learns(step: Step) -> dict[str, Tensor]:
    """Return the joint loss, and as ``kd`` what exit i teaches exit M."""
    return joint(step) | {"kd": _taught(step.logits[1], step.logits[0], step)}


def both_learn(step: Step) -> dict[str, Tensor]:
    """Return the joint loss, and as ``kd`` what the two teach each other: the sum, whatever ``reduction`` says."""
    return joint(step) | {"kd": mutual_distillation(step.logits, step.settings.temperature, "sum")}


def _taught(student: Tensor, teacher: Tensor, step: Step) -> Tensor:
    return distillation(student.unsqueeze(0), teacher, step.settings.temperature).sum()


METHODS = (
    Method(
        "pml-direct",
        "an early exit alone, the layers after it cut off",
        (Stage(last_loss, lambda settings: Sum(), forward=early_exit_alone, judged="early"),),
    ),
    Method(
        "pml-joint",
        "cross-entropy of an early exit and the last",
        (Stage(joint, lambda settings: Sum(), forward=both, judged="pair"),),
    ),
    Method(
        "pml-kd-early",
        "cross-entropy of an early exit and the last, the early one distils the last",
        (Stage(early_learns, weighted_sum, forward=both, judged="pair"),),
    ),
    Method(
        "pml-kd-late",
        "cross-entropy of an early exit and the last, the last one distils the early one",
        (Stage(late_learns, weighted_sum, forward=both, judged="pair"),),
    ),
    Method(
        "pml-mutual",
        "cross-entropy of an early exit and the last, each distils the other",
        (Stage(both_learn, weighted_sum, forward=both, judged="pair"),),
    ),
)
