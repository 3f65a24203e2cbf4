"""Losses on the labels: cross-entropy, or the squared error of regression, exit by exit and weighted by depth.

Shapes: M exits, B rows, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradalign.multiexit.objectives.checks import at_least_float32, check_labels, check_nonempty


def exit_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each exit's loss on the labels: the cross-entropy or, for floating labels, the squared error.

    Args:
        logits: (M, B, C), floating; C = 1 for regression.
        labels: (B,), integer, in [0, C), or floating for regression.

    Returns:
        (M,), the means over the rows, in nats, or in squared units of the labels; float32 or, for float64 logits,
        float64.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``labels`` no tensor of numbers.
        ValueError: A shape is not as above, there is no row, or a label is outside [0, C) (labels on an
            accelerator are left to the device's own check).

    >>> exit_losses(torch.tensor([[[1.0], [2.0]], [[3.0], [2.0]]]), torch.tensor([1.0, 2.0]))
    tensor([0., 2.])
    """
    M, B, C = check_nonempty(logits)
    rows = at_least_float32(logits)
    if isinstance(labels, Tensor) and labels.is_floating_point():
        _check_values(labels, (M, B, C))
        return (rows.squeeze(-1) - labels.to(rows.dtype)).square().mean(1)
    check_labels(labels, B, C)
    losses = F.cross_entropy(rows.flatten(0, 1), labels.long().repeat(M), reduction="none")
    return losses.view(M, B).mean(1)


def weighted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the average of the exits' losses on the labels, exit m weighted by m.

    L = sum_m m L_m / sum_m m with the L_m of ``exit_losses``; m stands for the cost of exit m.

    Args:
        logits: (M, B, C), floating; C = 1 for regression.
        labels: (B,), integer, in [0, C), or floating for regression.

    Returns:
        (), nats, or squared units of the labels; float32 or, for float64 logits, float64.

    Raises:
        TypeError: As ``exit_losses``.
        ValueError: As ``exit_losses``.

    References:
        Zhu et al., GAML-BERT, EMNLP 2021, Eq. 1; Zhou et al., BERT Loses Patience, NeurIPS 2020,
        arXiv:2006.04152.

    >>> weighted_loss(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([0.0]))  # (1 * 1 + 2 * 9) / 3
    tensor(6.3333)
    """
    losses = exit_losses(logits, labels)
    weights = torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)
    return (weights * losses).sum() / weights.sum()


def weighted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the average of the exits' cross-entropies, exit m weighted by m: ``weighted_loss`` for classes alone.

    Args:
        logits: (M, B, C), floating.
        labels: (B,), integer, in [0, C).

    Returns:
        (), nats; float32 or, for float64 logits, float64.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``labels`` no integer one.
        ValueError: As ``exit_losses``.

    >>> logits = torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]]]).log_softmax(-1)
    >>> weighted_cross_entropy(logits, torch.tensor([0]))  # (ln 2 + 2 ln(1 + e^-3)) / 3
    tensor(0.2634)
    """
    _, B, C = check_nonempty(logits)
    check_labels(labels, B, C)
    return weighted_loss(logits, labels)


def _check_values(labels: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise unless logits of this shape predict one value a row, and ``labels`` hold one."""
    _, B, C = shape
    if C != 1:
        raise ValueError(
            f"`logits` must be (exits, rows, 1) for floating labels, those of regression, got shape {shape}; for"
            " classes write labels.long()."
        )
    if labels.shape != (B,):
        raise ValueError(
            f"`labels` must be ({B},), one for each row, got shape {tuple(labels.shape)}; take those of the batch"
            " that gave the logits."
        )
