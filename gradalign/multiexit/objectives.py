"""What the exits are trained on: weighted cross-entropy and mutual distillation.

Shapes: M exits, B rows, C classes; stacked logits are (M, B, C), exit 1 first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gradalign.errors import finite_number, unknown_name

_REDUCTIONS = ("sum", "mean")


def weighted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the average of the exits' cross-entropies, exit m weighted by m.

    L = sum_m m CE_m / sum_m m, CE_m the mean over the rows; m stands for the cost of exit m.

    Args:
        logits: (M, B, C), floating.
        labels: (B,), integer, in [0, C).

    Returns:
        (), nats; float32 or, for float64 logits, float64.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``labels`` no integer one.
        ValueError: A shape is not as above, there is no row, or a label is outside [0, C) (labels on an
            accelerator are left to the device's own check).

    References:
        Zhu et al., GAML-BERT, EMNLP 2021, Eq. 1; Zhou et al., BERT Loses Patience, NeurIPS 2020,
        arXiv:2006.04152.

    >>> logits = torch.tensor([[[0.0, 0.0]], [[math.log(3.0), 0.0]]])  # p = (1/2, 1/2), then (3/4, 1/4)
    >>> weighted_cross_entropy(logits, torch.tensor([0]))  # (ln 2 + 2 ln 4/3) / 3
    tensor(0.4228)
    """
    M, B, C = _nonempty(logits)
    check_labels(labels, B, C)
    rows = _at_least_float32(logits).flatten(0, 1)
    losses = F.cross_entropy(rows, labels.long().repeat(M), reduction="none")
    weights = torch.arange(1, M + 1, dtype=losses.dtype, device=losses.device)
    return (weights * losses.view(M, B).mean(1)).sum() / weights.sum()


def mutual_distillation(logits: Tensor, temperature: float = 1.0, reduction: str = "sum") -> Tensor:
    """Let every exit learn from every other one.

    L = sum over the ordered pairs i != j of T^2 KL(sg p_j, p_i), mean over the rows, where exit j teaches and
    exit i learns, p_i = softmax(z_i / T), and sg is the stop-gradient. Costs O(M C) a row, not O(M^2 C).

    Args:
        logits: (M, B, C), floating, M >= 2. A class that all exits give -infinity takes no part.
        temperature: T > 0, dimensionless.
        reduction: ``"sum"`` over the pairs, Eq. 3 as printed, which grows like M^2 (132 pairs at M = 12);
            ``"mean"`` divides by M (M - 1), so that the loss stands beside a cross-entropy at any M.

    Returns:
        (), nats, zero where all exits agree, else positive; float32 or, for float64 logits, float64.

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

    >>> logits = torch.tensor([[[0.0, 0.0]], [[math.log(3.0), 0.0]]])  # p = (1/2, 1/2), then (3/4, 1/4)
    >>> mutual_distillation(logits)  # sum_c (p_2 - p_1)(ln p_2 - ln p_1) = ln(3) / 4
    tensor(0.2747)
    """
    M, _, _ = _nonempty(logits)
    if M == 1:
        raise ValueError("`logits` must hold two exits or more for distillation, got 1; leave the loss out.")
    T = finite_number("temperature", temperature)
    if T <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature!r}.")
    if reduction not in _REDUCTIONS:
        raise unknown_name("reduction", reduction, _REDUCTIONS)

    # Value. <a, b> sums over the classes; S = sum_j p_j. A pair i = j adds nothing, so sum all M^2 pairs:
    #   sum_ij <p_j, log p_j - log p_i> = M sum_j <p_j, log p_j> - sum_i <S, log p_i>
    #                                   = sum_i <M p_i - S, log p_i>.
    # Gradient. That of the pairs is -sum_i <S, d log p_i>. Holding M p_i - S fixed in the last line adds
    # M <p_i, d log p_i> = M d sum_c p_ic = 0 to it, so that line has both the value and the gradient.
    # Rounding. The left factors sum to 0 over i, so log p_i may be taken from any fixed row: from the mean.
    # Where the exits agree to within e, both factors are of order e: the error is e eps, not eps, beside e^2.
    log_p = F.log_softmax(_at_least_float32(logits) / T, dim=-1)
    p = log_p.detach().exp()
    fixed = M * (p - p.mean(0))
    # A class with log p = -inf in every exit has p = 0, and 0 log 0 is 0. One with -inf in some has no finite
    # mean: taken from 0 instead, it makes the loss infinite, as it must be.
    centre = log_p.detach().mean(0).nan_to_num(nan=math.nan, neginf=0.0)
    relative = log_p.masked_fill(fixed == 0, 0.0) - centre
    pairs = M * (M - 1) if reduction == "mean" else 1
    return T**2 / pairs * (fixed * relative).sum((0, 2)).mean()


def check_logits(logits: object) -> tuple[int, int, int]:
    """Return (M, B, C) of stacked logits, or raise unless they are that, floating, with M, C >= 1."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"`logits` must be one tensor (exits, rows, classes), got {type(logits).__name__}; write"
            " torch.stack(logits)."
        )
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be floating, got {logits.dtype}; give the scores before the softmax.")
    if logits.ndim != 3 or 0 in (logits.shape[0], logits.shape[2]):
        raise ValueError(
            "`logits` must be (exits, rows, classes), with an exit and a class at least, got shape"
            f" {tuple(logits.shape)}; stack the exits' logits with torch.stack."
        )
    M, B, C = logits.shape
    return M, B, C


def check_labels(labels: object, num_rows: int, num_classes: int) -> None:
    """Raise unless ``labels`` is an integer tensor (num_rows,); on the CPU, unless in [0, num_classes)."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"`labels` must be a tensor, got {labels!r}; write torch.tensor(labels).")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must be integer class numbers, got {labels.dtype}; write .long().")
    if labels.shape != (num_rows,):
        raise ValueError(
            f"`labels` must be ({num_rows},), one for each row, got shape {tuple(labels.shape)}; take"
            " those of the batch that gave the logits."
        )
    # Looking at the values would make the host wait for an accelerator, and break a compiled graph.
    if labels.device.type == "cpu" and num_rows and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"`labels` must be in 0..{num_classes - 1}, got {low} to {high}; number the classes from 0."
            )


def check_count(argument: str, value: object) -> int:
    """Return ``value``, or raise unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{argument}` must be an integer, got {value!r} ({type(value).__name__}).")
    if value < 1:
        raise ValueError(f"`{argument}` must be at least 1, got {value}.")
    return value


def _nonempty(logits: Tensor) -> tuple[int, int, int]:
    M, B, C = check_logits(logits)
    if B == 0:
        raise ValueError(f"`logits` must hold a row at least, got {tuple(logits.shape)}; skip empty batches.")
    return M, B, C


def _at_least_float32(logits: Tensor) -> Tensor:
    """Return half-precision logits in float32: the exits' differences are lost in fewer digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
