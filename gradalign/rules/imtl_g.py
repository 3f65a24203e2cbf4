"""IMTL-G: the step on which all gradients have projections of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import cosines, rounding, solve_consistently, wide
from gradalign.rules.base import Rule


@dataclass(frozen=True, eq=False)
class IMTLG(Rule):
    """Weight the gradients so that the step has one projection on each of their directions.

    w ~ pinv(G) sqrt(diag G) with sum w = 1; here w_i ~ u_i / norm(g_i) with Cu = 1 and C the matrix of cosines, the
    same where G is regular.

    Guarantees: (Gw)_i / sqrt(G_ii) is the same for all i, where G is regular; its sign is that of sum_i u_i /
    norm(g_i), which can be negative from K = 3 on. With K = 2, w = (norm(g_2), norm(g_1)) / (norm(g_1) + norm(g_2)).

    Note:
        Where C is singular, u is the shortest least-squares solution. A zero gradient gets the weight 0. Where the
        weights cannot be scaled to the sum 1, for their sum is 0, the sum of their magnitudes is 1.

    References:
        Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, Eq. 6 and 7.

    >>> IMTLG()(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))  # norms 1 and 2
    tensor([0.6667, 0.3333])
    """

    name: ClassVar[str] = "imtl-g"
    non_conflicting_groups: ClassVar[float] = 2

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        C, norms, inverse = cosines(wide(G))
        u = solve_consistently(C, (norms > 0).to(C.dtype), rounding(G))
        longest = norms.amax(-1, keepdim=True)
        w = u * inverse * longest
        total, size = w.sum(-1, keepdim=True), w.abs().sum(-1, keepdim=True)
        divisor = torch.where(total.abs() > rounding(G) * size, total, size)
        return (w / divisor.where(divisor != 0, 1.0)).to(G.dtype)
