"""The last exit teaches all others while it learns itself: distillation-based training, and FastBERT in one stage.

M exits, exit m with the probabilities p_m = softmax(z_m / T); sg is the stop-gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradalign.multiexit import processes
from gradalign.multiexit.methods.base import Method, Settings, Stage, Step
from gradalign.multiexit.objectives import distillation, exit_losses, weighted_loss
from gradalign.rules import Constant, GASoft

_SURE = 0.5  # a teacher's mean confidence above which its distribution is softened
_SOFTER = 1.05
_SCALE = 10.0  # of the whole loss, over M


def taught_by_last(step: Step) -> dict[str, Tensor]:
    """Return Eq. 1 of GAML-BERT, and as ``kd`` what the last exit teaches the others, their sum or mean."""
    settings = step.settings
    taught = distillation(step.logits[:-1], step.logits[-1], settings.temperature)
    kd = taught.mean() if settings.reduction == "mean" else taught.sum()
    return {"ce": weighted_loss(step.logits, step.labels), "kd": kd}


def distillation_based(step: Step) -> dict[str, Tensor]:
    """Return 10 / M sum_m CE_m, and as ``kd`` 10 / M T^2 sum_{m<M} H(sg p_M, p_m).

    T begins at the settings' and grows by 5 % after each step where the mean of max p_M is above one half. For
    regression the squared differences take the place of H, and T plays no part.

    References:
        Phuong and Lampert, Distillation-Based Training for Multi-Exit Architectures, ICCV 2019.
    """
    logits, scale = step.logits, _SCALE / len(step.logits)
    ce = scale * exit_losses(logits, step.labels).sum()
    if logits.shape[-1] == 1:
        return {"ce": ce, "kd": scale * distillation(logits[:-1], logits[-1]).sum()}
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    T = step.memory.get("temperature", torch.tensor(step.settings.temperature)).to(wide)
    log_p = F.log_softmax(wide / T, dim=-1)
    teacher = log_p[-1].detach().exp()
    kd = -scale * T**2 * (teacher * log_p[:-1]).sum(-1).mean(1).sum()
    sure = processes.mean(teacher.amax(-1).mean()) > _SURE
    step.memory["temperature"] = torch.where(sure, _SOFTER * T, T)
    return {"ce": ce, "kd": kd}


def weighted_sum(settings: Settings) -> Constant:
    """Return the rule of the sum (1 - alpha) ce + alpha kd."""
    return Constant((1 - settings.alpha, settings.alpha))


METHODS = (
    Method(
        "fastbert-ga",
        "cross-entropy of all exits (Eq. 1), distillation from the last exit aligned by GA-soft",
        (Stage(taught_by_last, lambda settings: GASoft(settings.alpha, settings.clamp, anchor="ce")),),
        exit="fastbert",
    ),
    Method(
        "dbt",
        "cross-entropy of all exits, distillation from the last exit at a temperature that grows",
        (Stage(distillation_based, weighted_sum),),
        Settings(alpha=0.5),
    ),
)
