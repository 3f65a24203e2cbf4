"""Nash-MTL: the step on which the losses would agree in a bargain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import quadratic
from gradalign.errors import finite_number, positive_integer
from gradalign.rules.kinds import Memory, StatefulRule
from gradalign.solvers import fair_weights


@dataclass(frozen=True, eq=False)
class NashMTL(StatefulRule):
    """Solve G w = 1/w, w > 0: the step maximises the product of the losses' rates of descent <g_i, d>.

    Guarantees: w_i <g_i, d> = 1 for every i, so that every loss falls to first order, unless they are
    Pareto-stationary; norm(d) = sqrt(K), whatever the losses' scale: the degree of d is 0.

    Args:
        max_norm: Shorten d to this norm where it is longer; the authors' code uses 1. None leaves sqrt(K).
        update_every: Solve at every n-th call and give the last weights in between.

    Note:
        Solved by Newton's method on the convex function whose gradient the equation is, where the authors use a
        sequence of linearised programs that need not arrive. Where the losses are Pareto-stationary no solution
        exists; a ridge of 1e-14 in units of each squared norm keeps the weights finite. A zero gradient gets the
        weight 0.

    References:
        Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022, arXiv:2202.01017, Claim 3.1.

    >>> NashMTL()(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))  # w_i = 1 / norm(g_i)
    tensor([1.0000, 0.5000])
    """

    max_norm: float | None = None
    update_every: int = 1

    name: ClassVar[str] = "nash-mtl"
    degree: ClassVar[float] = 0.0
    remembers: ClassVar[tuple[str, ...]] = ("weights", "calls")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_norm is not None and finite_number("max_norm", self.max_norm, 0.0) == 0:
            raise ValueError(f"`max_norm` must be above 0 or None, got {self.max_norm!r}.")
        positive_integer("update_every", self.update_every)
        object.__setattr__(self, "stateful", self.update_every > 1)

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        if not self.stateful:
            return self._shortened(fair_weights(G, 1.0).to(G.dtype), G)
        return super()._weights(G, names)

    def _begin(self, G: Tensor) -> Memory:
        return {
            "weights": torch.zeros_like(G[..., 0]),
            "calls": torch.zeros_like(G[..., 0, 0], dtype=torch.int64),
        }

    def _step(self, G: Tensor, memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        due = memory["calls"] % self.update_every == 0
        kept = memory["weights"]
        # Whether any block is due is asked on a CPU alone: an accelerator would have to be waited for.
        if G.device.type != "cpu" or bool(due.any()):
            kept = torch.where(due.unsqueeze(-1), fair_weights(G, 1.0).to(G.dtype), kept)
        return self._shortened(kept, G), {"weights": kept, "calls": memory["calls"] + 1}

    def _shortened(self, w: Tensor, G: Tensor) -> Tensor:
        if self.max_norm is None:
            return w
        norm = quadratic(G, w).sqrt()
        return torch.where(norm > self.max_norm, w * (self.max_norm / norm), w)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return ones: what the rule gives orthogonal gradients of length 1."""
        return (1.0,) * len(names)
