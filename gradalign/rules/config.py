"""ConFIG: the direction that has one angle with all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import cosines, rounding, solve_consistently, times, wide
from gradalign.rules.kinds import PreferenceRule


@dataclass(frozen=True, eq=False)
class ConFIG(PreferenceRule):
    """Go in the direction u whose cosines with all gradients are equal, as far as sum_i <g_i, u>.

    With C the matrix of cosines, D the norms: x = D^-1 pinv(C) t, t = K p; w = x (1'Gx) / (x'Gx).

    Guarantees: where C is regular, cos(d, g_i) is the same for all i, positive, so that Gw >= 0; with a preference the
    cosines are as p_i to p_j.

    Args:
        preference: (K,) numbers >= 0, to which the cosines are proportional; 1/K each where None.

    Note:
        Where C is singular no such direction may exist: pinv(C) t is then the shortest least-squares solution, and
        Gw >= 0 is not promised; exactly opposite gradients give d = 0. A zero gradient gets the weight 0.

    References:
        Liu et al., ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, 2024,
        arXiv:2408.11104, Eq. 2 and 3.

    >>> ConFIG()(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))  # u = (1, 1) / sqrt 2; (1 + 2) / sqrt 2 along it
    tensor([1.5000, 0.7500])
    """

    name: ClassVar[str] = "config"

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        C, norms, inverse = cosines(wide(G))
        K = C.shape[-1]
        target = wide(self._preferred(G)) * K * (norms > 0)
        y = solve_consistently(C, target, rounding(G))
        along = times(C, y)
        square = (y * along).sum(-1, keepdim=True)
        length = (norms * along).sum(-1, keepdim=True)  # 1'Gx
        # A square that is rounding is a direction that is none.
        some = square > rounding(G) * y.square().sum(-1, keepdim=True)
        return torch.where(some, y * inverse * length / square, 0.0).to(G.dtype)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return K p, by default ones: what the rule gives orthogonal gradients of one length."""
        return tuple(len(names) * p for p in super().plain_weights(names))
