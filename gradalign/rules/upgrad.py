"""UPGrad: each gradient alone is projected onto the directions that no loss objects to, and the results are added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.rules.kinds import PreferenceRule
from gradalign.solvers import dual_cone_projection


@dataclass(frozen=True, eq=False)
class UPGrad(PreferenceRule):
    """Project each gradient p_i g_i onto the dual cone {d : Jd >= 0}, and add the projections.

    w = sum_i argmin of v'Gv over v >= p_i e_i.

    Guarantees: Gw >= 0, no loss rises to first order; the aligned gradient grows linearly with each gradient's
    length, under conflict too. With K = 2 and p = 1/2 it is half of PCGrad's.

    Args:
        preference: (K,) numbers >= 0, the p by which the gradients enter; 1/K each where None.

    Note:
        The K programs are solved together, exactly; the result carries no ridge. Where G is singular the weights are
        not unique, the aligned gradient is.

    References:
        Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, arXiv:2406.16232, Section 3.

    >>> import torch
    >>> UPGrad()(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))  # (1 + 1, 1/4 + 1) / 2
    tensor([1.0000, 0.6250])
    """

    name: ClassVar[str] = "upgrad"
    non_conflicting_groups: ClassVar[float] = math.inf

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        alone = torch.diag_embed(self._preferred(G))  # row i: p_i e_i
        return dual_cone_projection(G.unsqueeze(-3), alone).sum(-2).to(G.dtype)
