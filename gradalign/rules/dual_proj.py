"""DualProj: the preferred sum of the gradients, projected onto the directions that no loss objects to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradalign.rules.kinds import PreferenceRule
from gradalign.solvers import dual_cone_projection


@dataclass(frozen=True, eq=False)
class DualProj(PreferenceRule):
    """Project the preferred sum of the gradients, J'p, onto the dual cone {d : Jd >= 0}.

    w = argmin of v'Gv over v >= p.

    Guarantees: Gw >= 0, no loss rises to first order; d is the nearest to J'p of all such directions.

    Args:
        preference: (K,) numbers >= 0, the p of the sum that is projected; 1/K each where None.

    Note:
        GEM's program, applied to the preferred sum rather than to one task's gradient. Where G is singular the
        weights are not unique, the aligned gradient is.

    References:
        Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017, arXiv:1706.08840, Eq. 11.

    >>> import torch
    >>> DualProj()(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))  # (11/18, 1/2): <g_1, d> = 0
    tensor([0.6111, 0.5000])
    """

    name: ClassVar[str] = "dual-proj"
    non_conflicting_groups: ClassVar[float] = math.inf

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        return dual_cone_projection(G, self._preferred(G)).to(G.dtype)
