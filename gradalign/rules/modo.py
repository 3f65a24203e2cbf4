"""MoDo: one step on the simplex for each step of training, from two batches' gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from gradalign.algebra import in_units, times, wide
from gradalign.errors import finite_number, flag
from gradalign.rules.batches import BatchedRule
from gradalign.rules.kinds import Memory
from gradalign.solvers import project_onto_simplex


@dataclass(frozen=True, eq=False)
class MoDo(BatchedRule):
    """Move the weights of the last step towards MGDA's, w <- Proj(w - gamma (A + rho I) w), and use them.

    A = J_1 J_2' of two independent batches (see ``batches``), so that its mean is free of the noise's square.

    Guarantees: none about conflict at a single step.

    Args:
        gamma: Step size on the simplex, >= 0.
        rho: Pull towards equal weights, >= 0.
        batches: How many batches the groups are laid out for: 1 (A = G, biased), 2 (the paper's) or 3.
        relative: Divide A by its mean diagonal, so that ``gamma`` is dimensionless and the weights do not depend on
            the losses' scale. False is the paper's, where gamma has the unit of 1 / squared gradient norm.

    References:
        Chen et al., Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
        Conflict-Avoidance, NeurIPS 2023, arXiv:2305.20057, Algorithm 1.

    >>> MoDo(gamma=0.5)(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # (.5 - .5 * .5 / 2, .5 - .5 * 1.5 / 2), on the simplex
    tensor([0.6250, 0.3750])
    """

    gamma: float = 0.1
    rho: float = 0.0
    relative: bool = field(default=True, kw_only=True)

    name: ClassVar[str] = "modo"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gamma", finite_number("gamma", self.gamma, 0.0))
        object.__setattr__(self, "rho", finite_number("rho", self.rho, 0.0))
        if not flag("relative", self.relative):
            object.__setattr__(self, "degree", math.nan)

    def _step(self, G: Tensor, memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        A = wide(self._between(G))
        A = in_units(A) if self.relative else A
        w = wide(memory["weights"])
        w = project_onto_simplex(w - self.gamma * (times(A, w) + self.rho * w)).to(G.dtype)
        return self._spread(w), {"weights": w}

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return equal weights, over the batches that the step is taken on."""
        n = len(names) // self.batches
        return self._plain((1 / n,) * n)
