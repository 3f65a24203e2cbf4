"""FairGrad: the step that is alpha-fair to the losses' rates of descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradalign.errors import finite_number
from gradalign.rules.base import Rule
from gradalign.solvers import fair_weights


@dataclass(frozen=True, eq=False)
class FairGrad(Rule):
    """Solve G w = w^(-1/alpha), w > 0: the step maximises an alpha-fair utility of the rates of descent <g_i, d>.

    alpha = 1 is proportional fairness, Nash-MTL without its norm; towards infinity the least rate counts alone.

    Guarantees: Gw > 0, every loss falls to first order, unless they are Pareto-stationary. Losses -> s losses gives
    d -> s^((1 - alpha) / (1 + alpha)) d: for alpha > 1 long gradients make short steps.

    Args:
        alpha: Fairness, > 0, dimensionless.

    Note:
        Solved by Newton's method on the convex function whose gradient the equation is. Where the losses are
        Pareto-stationary no solution exists; a ridge of 1e-14 in units of each squared norm keeps the weights finite.
        A zero gradient gets the weight 0. It stops after 64 steps: an alpha of 5 and more, or 1/5 and less, on norms
        that differ by twelve orders of magnitude can leave it short of the solution.

    References:
        Ban and Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024, arXiv:2402.15638, Eq. 5.

    >>> import torch
    >>> FairGrad(alpha=1.0)(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))  # w_i = 1 / norm(g_i)
    tensor([1.0000, 0.5000])
    """

    alpha: float = 2.0

    name: ClassVar[str] = "fairgrad"

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha = finite_number("alpha", self.alpha, 0.0)
        if alpha == 0:
            raise ValueError(f"`alpha` must be above 0, got {self.alpha!r}.")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "degree", (1 - alpha) / (1 + alpha))

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        return fair_weights(G, 1 / self.alpha).to(G.dtype)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return ones: what the rule gives orthogonal gradients of length 1."""
        return (1.0,) * len(names)
