"""CAGrad: of all steps near the preferred one, that which serves the worst-off loss best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.errors import finite_number, flag
from gradalign.rules.kinds import PreferenceRule
from gradalign.solvers import cosines, nonnegative_quadratic, wide

_STEPS = 40  # of Newton's method; 3 to 6 are usual
_PRECISION = 1e-14  # of the distance from the preferred step


@dataclass(frozen=True, eq=False)
class CAGrad(PreferenceRule):
    """Maximise min_i <g_i, d> over the ball of radius c norm(g_0) around the preferred sum g_0 = J'p.

    w = p + c sqrt(p'Gp) / sqrt(u'Gu) u, with u = argmin of u'Gp + c sqrt(p'Gp) sqrt(u'Gu) over the simplex.

    Guarantees: norm(d - g_0) = c norm(g_0) unless the losses are Pareto-stationary, so that d never turns away from
    g_0 for c < 1. Conflict is lessened, not excluded: Gw >= 0 need not hold.

    Args:
        c: Radius of the ball in units of norm(g_0), in [0, 1]; 0 is the preferred sum, towards 1 it acts like MGDA.
        preference: (K,) numbers >= 0; 1/K each where None.
        rescale: Divide the weights by 1 + c^2, an option of the authors' code.

    Note:
        Solved as the equivalent: the least move x >= 0 such that <g_i, g_0 + J'x> >= m for every i, with m such
        that norm(J'x) = c norm(g_0); m by Newton's method, for the distance is convex in it. Where the losses are
        Pareto-stationary, u'Gu = 0, the paper divides by zero; here d is then the best step in the ball, at most
        c norm(g_0) from g_0. No term is added under the roots.

    References:
        Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021, arXiv:2110.14048,
        Algorithm 1.

    >>> CAGrad(c=0.5)(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
    tensor([0.7041, 0.5000])
    """

    c: float = 0.4
    rescale: bool = False

    name: ClassVar[str] = "cagrad"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "c", finite_number("c", self.c, 0.0, 1.0))
        flag("rescale", self.rescale)

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        p = self._preferred(G)
        w = p + _move(wide(G), wide(p), self.c).to(G.dtype)
        return w / (1 + self.c**2) if self.rescale else w


def _move(G: Tensor, p: Tensor, c: float) -> Tensor:
    """Return the x of the class's note, (..., K)."""
    C, norms, inverse = cosines(G)
    products = (C @ (p * norms).unsqueeze(-1)).squeeze(-1)  # <g_0, g_i> / norm(g_i)
    radius = c * ((p * norms) * products).sum(-1, keepdim=True).clamp(min=0).sqrt()
    # <g_i, d> is at most norm(g_i) (products_i + radius) in the ball: m starts above its value and falls.
    bounds = torch.where(norms > 0, norms * (products + radius), 0.0)
    margin = bounds.amin(-1, keepdim=True)
    x = torch.zeros_like(p)
    for _ in range(_STEPS):
        # In cosines: the least move such that <g_i, d> / norm(g_i) >= margin / norm(g_i).
        x = nonnegative_quadratic(C, margin * inverse - products)
        distance = (x * (C @ x.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True).clamp(min=0).sqrt()
        slope = (x * inverse).sum(-1, keepdim=True)  # d distance^2 / d margin, halved
        over = distance - radius
        near = over.abs() <= _PRECISION * radius
        step = over * distance / slope.where(slope > 0, 1.0)
        margin = torch.where(near | (slope == 0), margin, margin - step)
        if G.device.type == "cpu" and bool((near | (slope == 0)).all()):
            break
    return x * inverse
