"""Exits that learn from exits: from one teacher, or all from one another.

Shapes: M exits, B rows, C classes. One output, C = 1, is a predicted value: the losses are squared differences then.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from gradalign.errors import finite_number, unknown_name
from gradalign.multiexit.objectives.checks import at_least_float32, check_nonempty

_REDUCTIONS = ("sum", "mean")


def distillation(students: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Let exits learn from one teacher, which learns nothing.

    L_s = T^2 KL(sg p, p_s), mean over the rows, with p = softmax(z / T) of the teacher and p_s of student s, sg the
    stop-gradient. For regression, C = 1, L_s = (sg z - z_s)^2, and T plays no part.

    Args:
        students: (S, B, C), floating. A class that the teacher gives -infinity takes no part in the sum.
        teacher: (B, C), floating.
        temperature: T > 0, dimensionless.

    Returns:
        (S,), nats, or squared units of the labels; float32 or, for float64 logits, float64.

    Raises:
        TypeError: ``students`` is no floating tensor, or ``temperature`` no number.
        ValueError: ``students`` is not (S, B, C) with B >= 1, ``teacher`` not (B, C), or ``temperature`` not finite
            and positive.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.

    >>> import torch
    >>> students, teacher = torch.zeros(2, 1, 2), torch.tensor([[math.log(3.0), 0.0]])
    >>> distillation(students, teacher)  # 3/4 ln 3/2 + 1/4 ln 1/2, twice
    tensor([0.1308, 0.1308])
    """
    _, B, C = check_nonempty(students)
    if teacher.shape != (B, C):
        raise ValueError(f"`teacher` must be ({B}, {C}), as one student, got shape {tuple(teacher.shape)}.")
    T = _check_temperature(temperature)
    students, teacher = at_least_float32(students), at_least_float32(teacher.detach())
    if C == 1:
        return (students - teacher).square().squeeze(-1).mean(1)
    log_p, log_q = F.log_softmax(teacher / T, dim=-1), F.log_softmax(students / T, dim=-1)
    p = log_p.exp()
    surplus = (log_p - log_q).masked_fill(p == 0, 0.0)  # 0 log 0 is 0
    return T**2 * (p * surplus).sum(-1).mean(1)


def mutual_distillation(logits: Tensor, temperature: float = 1.0, reduction: str = "sum") -> Tensor:
    """Let every exit learn from every other one.

    L = sum over the ordered pairs i != j of T^2 KL(sg p_j, p_i), mean over the rows, where exit j teaches and
    exit i learns, p_i = softmax(z_i / T), and sg is the stop-gradient. Costs O(M C) a row, not O(M^2 C).
    For regression, C = 1, a pair's loss is (sg z_j - z_i)^2, and T plays no part.

    Args:
        logits: (M, B, C), floating, M >= 2. A class that all exits give -infinity takes no part.
        temperature: T > 0, dimensionless.
        reduction: ``"sum"`` over the pairs, Eq. 3 as printed, which grows like M^2 (132 pairs at M = 12);
            ``"mean"`` divides by M (M - 1), so that the loss stands beside a cross-entropy at any M.

    Returns:
        (), nats, or squared units of the labels; zero where all exits agree, else positive; float32 or, for float64
        logits, float64.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``temperature`` no number.
        ValueError: ``logits`` is not (M, B, C) with M >= 2 and B >= 1, ``temperature`` is not finite and
            positive, or ``reduction`` is unknown.

    Note:
        The paper prints KD_{i->j} without naming temperature, direction or stop-gradient: teacher's
        distribution first, each pair with its own stop-gradient, is the form of Sun et al.

    References:
        Zhu et al., GAML-BERT, EMNLP 2021, Eq. 3; Sun et al., Deeply-supervised Knowledge Synergy, CVPR 2019,
        arXiv:1906.00675.

    >>> import torch
    >>> logits = torch.tensor([[[0.0, 0.0]], [[math.log(3.0), 0.0]]])  # p = (1/2, 1/2), then (3/4, 1/4)
    >>> mutual_distillation(logits)  # sum_c (p_2 - p_1)(ln p_2 - ln p_1) = ln(3) / 4
    tensor(0.2747)
    """
    M, _, C = check_nonempty(logits)
    if M == 1:
        raise ValueError("`logits` must hold two exits or more for distillation, got 1; leave the loss out.")
    T = _check_temperature(temperature)
    if reduction not in _REDUCTIONS:
        raise unknown_name("reduction", reduction, _REDUCTIONS)
    pairs = M * (M - 1) if reduction == "mean" else 1
    if C == 1:
        values = at_least_float32(logits).squeeze(-1)
        return (values.unsqueeze(1) - values.detach()).square().sum((0, 1)).mean() / pairs

    # Value. <a, b> sums over the classes; S = sum_j p_j. A pair i = j adds nothing, so sum all M^2 pairs:
    #   sum_ij <p_j, log p_j - log p_i> = M sum_j <p_j, log p_j> - sum_i <S, log p_i>
    #                                   = sum_i <M p_i - S, log p_i>.
    # Gradient. That of the pairs is -sum_i <S, d log p_i>. Holding M p_i - S fixed in the last line adds
    # M <p_i, d log p_i> = M d sum_c p_ic = 0 to it, so that line has both the value and the gradient.
    # Rounding. The left factors sum to 0 over i, so log p_i may be taken from any fixed row: from the mean.
    # Where the exits agree to within e, both factors are of order e: the error is e eps, not eps, beside e^2.
    log_p = F.log_softmax(at_least_float32(logits) / T, dim=-1)
    p = log_p.detach().exp()
    fixed = M * (p - p.mean(0))
    # A class with log p = -inf in every exit has p = 0, and 0 log 0 is 0. One with -inf in some has no finite
    # mean: taken from 0 instead, it makes the loss infinite, as it must be.
    centre = log_p.detach().mean(0).nan_to_num(nan=math.nan, neginf=0.0)
    relative = log_p.masked_fill(fixed == 0, 0.0) - centre
    return T**2 / pairs * (fixed * relative).sum((0, 2)).mean()


def _check_temperature(temperature: float) -> float:
    T = finite_number("temperature", temperature)
    if T <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature!r}.")
    return T
