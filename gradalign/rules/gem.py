"""GEM: a task's gradient is projected onto the directions that no memory objects to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import wide
from gradalign.errors import finite_number
from gradalign.rules.kinds import AnchoredRule
from gradalign.solvers import nonnegative_quadratic


@dataclass(frozen=True, eq=False)
class GEM(AnchoredRule):
    """Move the anchor's gradient g as little as it takes to conflict with none of the others.

    With M the others' rows, v = argmin of v'(MM' + eI)v / 2 + (Mg)'v over v >= margin, and d = g + M'v.

    Guarantees: <d, g_k> >= -e v_k for every k; with ridge = 0, Md >= 0, and with margin = 0 too
    d is the nearest such direction to g.

    Args:
        margin: Least weight of every memory, >= 0, dimensionless; a bias towards what must not be forgotten.
        ridge: e in units of the mean squared norm of the others' gradients, >= 0.
        anchor: The index or name of the task that is learnt; the others are what must not be forgotten.

    Note:
        e and the margin as a bound are the authors' code's; there e is absolute, here in units of the squared norms, so
        that it acts alike at any scale. That code solves the program only where some memory conflicts; with margin = 0
        that is the same, with a margin every step has it.

    References:
        Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017, arXiv:1706.08840,
        Eq. 11 and Algorithm 1.

    >>> GEM(ridge=0.0)(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
    tensor([1., 1.])
    """

    margin: float = 0.0
    ridge: float = 1e-3

    name: ClassVar[str] = "gem"
    min_groups: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "margin", finite_number("margin", self.margin, 0.0))
        object.__setattr__(self, "ridge", finite_number("ridge", self.ridge, 0.0))

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        a = self.anchor_index(G.shape[-1], names)
        W = wide(G)
        M = _without(_without(W, a, -2), a, -1)  # the others' Gramian, MM'
        squares = M.diagonal(dim1=-2, dim2=-1)
        H = M + torch.diag_embed((self.ridge * squares.mean(-1, keepdim=True)).expand_as(squares))
        # With v = margin + x the bound is x >= 0.
        x = nonnegative_quadratic(H, -_without(W[..., a], a, -1) - self.margin * H.sum(-1))
        v = (self.margin + x).to(G.dtype)
        return torch.cat([v[..., :a], torch.ones_like(G[..., :1, 0]), v[..., a:]], -1)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return 1 for the anchor and ``margin`` for the others: without conflict they are only watched."""
        a = self.anchor_index(len(names), names)
        return tuple(1.0 if k == a else self.margin for k in range(len(names)))


def _without(G: Tensor, a: int, dim: int) -> Tensor:
    """Return G without the a-th of a dimension, by slices: an index would be copied to the device."""
    return torch.cat([G.narrow(dim, 0, a), G.narrow(dim, a + 1, G.shape[dim] - a - 1)], dim)
