"""PCD: the main gradient, bent as little as gives each auxiliary its share of progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import lengths, quadratic, rounding, times, wide
from gradalign.errors import finite_number
from gradalign.rules.kinds import Anchored, Memory, StatefulRule
from gradalign.solvers import nonnegative_quadratic

# Of shares that exclude one another some combination is 0, so that on average a whole share is missed.
_MET = 0.5
_ENDLESS = 1e3  # times the anchor's length: multipliers beyond it whose sum is rounding stand for none


@dataclass(frozen=True, eq=False)
class PCD(Anchored, StatefulRule):
    """Follow the anchor's gradient as closely as leaves every auxiliary the share tau of its own progress.

    With h_i = g_i / sqrt(v_i), v_i the average of norm(g_i)^2 over the calls, decayed by beta:
    e = argmin of norm(e - h_a)^2 / 2 such that <h_k, e> >= tau norm(h_k)^2 for every auxiliary k;
    d = e norm(g_a) / norm(e).

    Guarantees: <d, g_k> >= 0 for every auxiliary wherever the shares can be had together; norm(d) = norm(g_a) unless
    e = 0. The anchor's own loss may rise, and d even be -g_a, where the shares take it that far. Scaling one
    auxiliary's loss changes nothing.

    Args:
        tau: The share, in [0, 1], dimensionless.
        beta: Decay of the averages, in [0, 1).
        anchor: The main group's index or name.

    Note:
        Where the shares cannot be had together, say of opposite auxiliaries, they are dropped: d = g_a. The average
        has no epsilon: a gradient that has always been zero has no share. The paper frees it of its bias, a common
        factor that cancels in d. Where e = 0, d = 0.

    References:
        Varam and AlHajri, Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
        Multi-Objective Optimization, 2026, arXiv:2606.29521.

    >>> PCD(tau=0.5)(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))  # e = h_a + h_k / 2, of length sqrt(5) / 2
    tensor([0.8944, 0.1491])
    """

    tau: float = 0.02
    beta: float = 0.999

    name: ClassVar[str] = "pcd"
    min_groups: ClassVar[int] = 2
    remembers: ClassVar[tuple[str, ...]] = ("squares",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tau", finite_number("tau", self.tau, 0.0, 1.0))
        beta = finite_number("beta", self.beta, 0.0, 1.0)
        if beta == 1:
            raise ValueError(f"`beta` must be in [0, 1), got {self.beta!r}; an average that never moves has no value.")
        object.__setattr__(self, "beta", beta)

    def _begin(self, G: Tensor) -> Memory:
        return {"squares": torch.zeros_like(G[..., 0])}

    def _step(self, G: Tensor, memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        a = self.anchor_index(G.shape[-1], names)
        now = G.diagonal(dim1=-2, dim2=-1).clamp(min=0)
        squares = memory["squares"].lerp(now, 1 - self.beta)
        scale = torch.where(squares > 0, wide(squares).rsqrt(), 0.0)
        H = wide(G) * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        w = self._bent(H, a, rounding(G)) * scale
        length = (wide(now)[..., a, None] / quadratic(wide(G), w)).sqrt()
        return torch.where(length.isfinite(), w * length, 0.0).to(G.dtype), {"squares": squares}

    def _bent(self, H: Tensor, a: int, least: float) -> Tensor:
        """Return the weights of e on the h, (..., K), zeros where e = 0."""
        only = torch.zeros_like(H[..., 0])
        only[..., a] = 1.0
        sizes = lengths(H)
        shares = (self.tau * sizes.square() - H[..., a]) * (1 - only)
        among = H * (1 - only).unsqueeze(-1) * (1 - only).unsqueeze(-2)  # the anchor has no share, and no multiplier
        multipliers = nonnegative_quadratic(among, shares)
        w = only + multipliers
        total = (w * sizes).sum(-1, keepdim=True)
        square = quadratic(H, w)
        missed = shares - times(among, multipliers)
        # Shares that exclude one another are missed, or are met by rounding alone, at the price of endless multipliers.
        rounded = square <= least * total.square()
        met = (missed <= _MET * self.tau * sizes.square() + least * sizes * total).all(-1, keepdim=True)
        possible = met & ~(rounded & (total > _ENDLESS * sizes[..., a, None]))
        return torch.where(possible, w.where(~rounded, 0.0), only)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return ones: where all gradients agree, each loss makes its progress."""
        return (1.0,) * len(names)
