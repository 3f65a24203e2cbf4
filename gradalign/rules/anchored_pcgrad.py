"""Anchored PCGrad: an auxiliary gradient loses what conflicts with the main one, and keeps the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import quotient
from gradalign.errors import finite_number
from gradalign.rules.kinds import AnchoredRule


@dataclass(frozen=True, eq=False)
class AnchoredPCGrad(AnchoredRule):
    """Take from each auxiliary gradient its conflicting part alone, and add the rest to the anchor's.

    d = (1 - alpha) g_a + alpha sum_k (g_k - min(0, G_ka) / G_aa g_a), that is w_k = alpha and
    w_a = (1 - alpha) - alpha sum_k min(0, G_ka) / G_aa.

    Guarantees: <d, g_a> >= (1 - alpha) norm(g_a)^2, and w_a >= 1 - alpha: the anchor's loss falls at least as fast
    as on (1 - alpha) of its own gradient. The auxiliaries' own progress orthogonal to g_a is kept whole.

    Args:
        alpha: Weight of the auxiliaries, in [0, 1].
        anchor: The main group's index or name.

    Note:
        PCGrad made one-sided: the hypothesis H1 of GAML-BERT as it is worded, where GA-soft keeps the projection and
        drops the rest. G_aa = 0 takes nothing away.

    References:
        Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv:2001.06782, Algorithm 1. Zhu et al.,
        GAML-BERT, EMNLP 2021, Section 3.3.

    >>> AnchoredPCGrad(alpha=0.5)(torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))  # .5 + .5 * 2 / 1
    tensor([1.5000, 0.5000])
    """

    alpha: float = 0.3

    name: ClassVar[str] = "anchored-pcgrad"
    min_groups: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", finite_number("alpha", self.alpha, 0.0, 1.0))

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        a = self.anchor_index(G.shape[-1], names)
        # The anchor's own product is positive, and so left out.
        conflicts = quotient(G[..., a].clamp(max=0), G[..., a, a].unsqueeze(-1))
        w = torch.full_like(G[..., 0], self.alpha)
        w[..., a] = (1 - self.alpha) - self.alpha * conflicts.sum(-1)
        return w

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return 1 - alpha for the anchor and alpha for every auxiliary."""
        a = self.anchor_index(len(names), names)
        return tuple(1 - self.alpha if k == a else self.alpha for k in range(len(names)))
