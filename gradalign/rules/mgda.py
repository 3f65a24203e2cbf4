"""MGDA: the shortest vector in the convex hull of the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradalign.rules.base import Rule
from gradalign.solvers import min_norm_in_simplex


@dataclass(frozen=True, eq=False)
class MGDA(Rule):
    """Weight the gradients so that their weighted mean is as short as it can be.

    w = argmin of w'Gw over the simplex, w >= 0 and sum w = 1. With K = 2,
    w_1 = clip((G_22 - G_12) / (G_11 + G_22 - 2 G_12), 0, 1).

    Guarantees: <d, g_i> >= norm(d)^2 for every i, so that Gw >= 0; d = 0 if and only if the losses are
    Pareto-stationary. Short gradients rule the step: a group whose gradient vanishes stops it.

    Note:
        Solved exactly, where the papers' Frank-Wolfe iteration stops early. Where G is singular the weights are not
        unique, the aligned gradient is.

    References:
        Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization, Comptes Rendus
        Mathématique 350, 2012. Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018,
        arXiv:1810.04650, Eq. 3.

    >>> import torch
    >>> MGDA()(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))  # (4 + 1) / (1 + 4 + 2)
    tensor([0.7143, 0.2857])
    """

    name: ClassVar[str] = "mgda"
    non_conflicting_groups: ClassVar[float] = math.inf

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        return min_norm_in_simplex(G).to(G.dtype)
