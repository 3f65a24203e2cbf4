"""OL-AUX: auxiliaries gain weight while their gradients agree with the main one, and lose it while they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import quotient
from gradalign.errors import finite_number, flag, positive_integer
from gradalign.rules.kinds import Anchored, Memory, StatefulRule


@dataclass(frozen=True, eq=False)
class OLAux(Anchored, StatefulRule):
    """Learn the auxiliaries' weights by descent on the anchor's loss, some steps ahead.

    w_a = 1; after every ``horizon`` calls w_k <- w_k + rate sum <g_a, g_k>, the sum running over these calls.

    Guarantees: none about conflict. A weight may fall below zero: an auxiliary that hurts is then unlearnt.

    Args:
        rate: The paper's alpha beta, learning rate times step size of the weights, >= 0.
        horizon: The paper's N, calls between two changes of the weights.
        initial: The auxiliaries' first weight.
        relative: Divide each product by <g_a, g_a>, so that ``rate`` is dimensionless and the weights do not depend on
            the losses' scale. False is the paper's, where it has the unit of 1 / squared gradient norm.
        anchor: The main group's index or name.

    Note:
        The call that completes a horizon already returns the new weights, one step before the authors' code does.
        G_aa = 0 adds nothing when ``relative``.

    References:
        Lin et al., Adaptive Auxiliary Task Weighting for Reinforcement Learning, NeurIPS 2019, Algorithm 1.

    >>> rule = OLAux(rate=0.5, horizon=2)
    >>> G = torch.tensor([[2.0, -1.0], [-1.0, 4.0]])
    >>> rule(G), rule(G)  # the second adds .5 * 2 * -1/2
    (tensor([1., 1.]), tensor([1.0000, 0.5000]))
    """

    rate: float = 1.0
    horizon: int = 5
    initial: float = 1.0
    relative: bool = field(default=True, kw_only=True)

    name: ClassVar[str] = "olaux"
    min_groups: ClassVar[int] = 2
    remembers: ClassVar[tuple[str, ...]] = ("weights", "sums", "calls")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rate", finite_number("rate", self.rate, 0.0))
        positive_integer("horizon", self.horizon)
        object.__setattr__(self, "initial", finite_number("initial", self.initial))
        if not flag("relative", self.relative):
            object.__setattr__(self, "degree", math.nan)

    def _begin(self, G: Tensor) -> Memory:
        return {
            "weights": torch.full_like(G[..., 0], self.initial),
            "sums": torch.zeros_like(G[..., 0]),
            "calls": torch.zeros_like(G[..., 0, 0], dtype=torch.int64),
        }

    def _step(self, G: Tensor, memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        a = self.anchor_index(G.shape[-1], names)
        products = G[..., a]
        if self.relative:
            products = quotient(products, G[..., a, a].unsqueeze(-1))
        sums = memory["sums"] + products
        calls = memory["calls"] + 1
        due = (calls % self.horizon == 0).unsqueeze(-1)
        learnt = torch.where(due, memory["weights"] + self.rate * sums, memory["weights"])
        weights = learnt.clone()
        weights[..., a] = 1.0
        return weights, {"weights": learnt, "sums": sums.where(~due, 0.0), "calls": calls}

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return 1 for the anchor and ``initial`` for every auxiliary."""
        a = self.anchor_index(len(names), names)
        return tuple(1.0 if k == a else self.initial for k in range(len(names)))
