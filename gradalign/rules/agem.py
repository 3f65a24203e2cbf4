"""A-GEM: a task's gradient loses what conflicts with the average of the memories'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import quadratic, quotient
from gradalign.rules.kinds import AnchoredRule


@dataclass(frozen=True, eq=False)
class AGEM(AnchoredRule):
    """Project the anchor's gradient g onto the half-space that the others' sum r does not object to.

    d = g where <g, r> >= 0, else g - <g, r> / <r, r> r: w_a = 1 and w_k = max(0, -<g, r> / <r, r>).

    Guarantees: <d, r> >= 0: to first order the others' mean loss does not rise; one of them may.

    Args:
        anchor: The index or name of the task that is learnt; the others are what must not be forgotten.

    Note:
        The paper draws r from a memory of all earlier tasks; here it is the sum of the other groups, whose length does
        not matter. r = 0 takes nothing away; an r that nearly cancels is known from G only up to the rounding of its
        terms.

    References:
        Chaudhry et al., Efficient Lifelong Learning with A-GEM, ICLR 2019, arXiv:1812.00420, Eq. 11.

    >>> AGEM()(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))  # <g, r> / <r, r> = -1
    tensor([1., 1.])
    """

    name: ClassVar[str] = "agem"
    min_groups: ClassVar[int] = 2
    non_conflicting_groups: ClassVar[float] = 2

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        a = self.anchor_index(G.shape[-1], names)
        others = torch.ones_like(G[..., 0])
        others[..., a] = 0.0
        product = (G[..., a] * others).sum(-1, keepdim=True)
        w = quotient(-product.clamp(max=0), quadratic(G, others)) * others
        w[..., a] = 1.0
        return w

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return 1 for the anchor and 0 for the others: without conflict they are only watched."""
        a = self.anchor_index(len(names), names)
        return tuple(float(k == a) for k in range(len(names)))
