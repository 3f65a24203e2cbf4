"""One stage, one loss: the exits' losses on the labels, weighted in a way of their own.

E epochs, e the one at hand, counted from 1; M exits, exit i with the loss CE_i.
"""

from __future__ import annotations

from torch import Tensor

from gradalign.multiexit.methods.base import Method, Stage, Step
from gradalign.multiexit.objectives import exit_losses
from gradalign.rules import Sum

_LARGEST = 0.9  # of the weights, at the last internal exit
_SMALLEST = 0.01


def shallow_deep(step: Step) -> dict[str, Tensor]:
    """Return CE_M + sum_{i<M} c_i CE_i, c_i = min(C_i, .01 + e C_i / E).

    C_i stands for the relative cost of exit i: .9 i / (M - 1), the paper's .15, .30, ..., .90 for six internal exits.

    References:
        Kaya et al., Shallow-Deep Networks, ICML 2019, arXiv:1810.07052.
    """
    losses = exit_losses(step.logits, step.labels)
    last, total = len(losses), losses[-1]
    for i in range(1, last):
        largest = _LARGEST * i / (last - 1)
        total = total + min(largest, _SMALLEST + largest * step.epoch / step.epochs) * losses[i - 1]
    return {"ce": total}


def alternating(step: Step) -> dict[str, Tensor]:
    """Return CE_M at the first, third, ... step of the stage, sum_i CE_i at the others.

    References:
        Xin et al., BERxiT: Early Exiting for BERT with Better Fine-Tuning and Extension to Regression, EACL 2021.
    """
    losses = exit_losses(step.logits, step.labels)
    return {"ce": losses[-1] if step.number % 2 == 0 else losses.sum()}


METHODS = (
    Method(
        "shallow-deep",
        "cross-entropy of all exits, the internal ones' weight growing with the epochs",
        (Stage(shallow_deep, lambda settings: Sum()),),
    ),
    Method(
        "berxit",
        "the last exit's cross-entropy and that of all exits, step by step in turn",
        (Stage(alternating, lambda settings: Sum()),),
    ),
)
