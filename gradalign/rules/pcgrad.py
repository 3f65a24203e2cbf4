"""PCGrad: each gradient loses its conflicting part against the others, one after the other in random order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import quotient
from gradalign.rules.kinds import RandomRule


@dataclass(frozen=True, eq=False)
class PCGrad(RandomRule):
    """Project each gradient onto the normal plane of every gradient it conflicts with, and add the results.

    For each group i, start from c = e_i; for the other groups j in random order, if (Gc)_j < 0 then
    c_j <- c_j - (Gc)_j / G_jj. The weights are the sum of the K vectors c.

    Guarantees: with K = 2 the aligned gradient conflicts with neither, Gw >= 0. From K = 3 on it may still
    conflict: a later projection can undo an earlier one. That is the paper's algorithm, not an error of this one.

    Args:
        seed: Seed of the rule's own generator, which draws the orders; each block and each group has its own order.

    Note:
        The paper projects vectors; c are the coordinates of those vectors in the gradients, so that only G is
        needed. j = i is never drawn. A group whose gradient is zero has no plane and projects nothing.

    References:
        Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv:2001.06782, Algorithm 1.

    >>> PCGrad()(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))  # c1 = (1, 1/4), c2 = (1/1, 1)
    tensor([2.0000, 1.2500])
    """

    name: ClassVar[str] = "pcgrad"
    equivariant: ClassVar[bool] = False  # the orders are drawn for positions
    non_conflicting_groups: ClassVar[float] = 2

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        K = G.shape[-1]
        planes = self._orders(G)
        squares = G.diagonal(dim1=-2, dim2=-1)
        C = torch.eye(K, dtype=G.dtype, device=G.device).expand(G.shape).clone()  # row i: group i's c
        for j in planes.unbind(-1):  # (..., K): for each group i the next j
            products = (G.gather(-2, j.unsqueeze(-1).expand_as(G)) * C).sum(-1)  # (Gc)_j, one for each i
            steps = quotient(-products.clamp(max=0), squares.gather(-1, j))  # a zero gradient takes nothing away
            C.scatter_add_(-1, j.unsqueeze(-1), steps.unsqueeze(-1))
        return C.sum(-2)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return ones: without conflict PCGrad is the sum."""
        return (1.0,) * len(names)
