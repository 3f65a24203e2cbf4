"""CAGrad: of all steps near the preferred one, that which serves the worst-off loss best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradalign.errors import finite_number, flag
from gradalign.rules.kinds import PreferenceRule
from gradalign.solvers import best_move_in_ball


@dataclass(frozen=True, eq=False)
class CAGrad(PreferenceRule):
    """Maximise min_i <g_i, d> over the ball of radius c norm(g_0) around the preferred sum g_0 = J'p.

    w = p + c sqrt(p'Gp) / sqrt(u'Gu) u, with u = argmin of u'Gp + c sqrt(p'Gp) sqrt(u'Gu) over the simplex.

    Guarantees: norm(d - g_0) = c norm(g_0) unless the losses are Pareto-stationary, so that d never turns away from
    g_0 for c < 1. Conflict is lessened, not excluded: Gw >= 0 need not hold.

    Args:
        c: Radius of the ball in units of norm(g_0), in [0, 1]; 0 is the preferred sum; MGDA lies beyond 1.
        preference: (K,) numbers >= 0; 1/K each where None.
        rescale: Divide the weights by 1 + c^2, an option of the authors' code.

    Note:
        Solved exactly, see ``gradalign.solvers.best_move_in_ball``. Where the losses are
        Pareto-stationary, u'Gu = 0, the paper divides by zero; here d is then the best step in the ball, at most
        c norm(g_0) from g_0. No term is added under the roots.

    References:
        Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021, arXiv:2110.14048,
        Algorithm 1.

    >>> import torch
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
        w = p + best_move_in_ball(G, p, self.c).to(G.dtype)
        return w / (1 + self.c**2) if self.rescale else w
