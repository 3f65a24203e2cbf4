"""Bloop: the auxiliaries act only across the main gradient's average, which is what they must not disturb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import quotient
from gradalign.errors import finite_number
from gradalign.rules.kinds import Anchored, Memory
from gradalign.rules.rows import StatefulRowRule, products, share_of_present


@dataclass(frozen=True, eq=False)
class Bloop(Anchored, StatefulRowRule):
    """Add to the anchor's gradient the part of the auxiliaries' sum that is orthogonal to the anchor's average.

    m <- m + rho (g - m); d = g + lam (a - <m, a> / <m, m> m), with g the anchor's gradient and a the others' sum.

    Guarantees: <d - g, m> = 0: on average over the batches the auxiliaries neither help nor hinder the anchor.

    Args:
        lam: Weight of the auxiliaries, >= 0.
        rho: Share of the present gradient in the average, in (0, 1].
        anchor: The main group's index or name.

    Note:
        The average begins at the first gradient; its length does not matter. m = 0 takes nothing away. It costs one
        gradient of memory, in the rule's state.

    References:
        Hsieh et al., Careful with that Scalpel: Improving Gradient Surgery with an EMA, ICML 2024, arXiv:2402.02998,
        Algorithm 1.

    >>> Bloop(lam=0.5)(torch.tensor([[1.0, 0.0], [-3.0, 2.0]]))  # the part along g goes
    tensor([1., 1.])
    """

    lam: float = 0.1
    rho: float = 0.1

    name: ClassVar[str] = "bloop"
    min_groups: ClassVar[int] = 2
    remembers: ClassVar[tuple[str, ...]] = ("average", "calls")
    elementwise: ClassVar[tuple[str, ...]] = ("average",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lam", finite_number("lam", self.lam, 0.0))
        rho = finite_number("rho", self.rho, 0.0, 1.0)
        if rho == 0:
            raise ValueError(f"`rho` must be in (0, 1], got {self.rho!r}; an average that never moves has no value.")
        object.__setattr__(self, "rho", rho)

    def _begin(self, rows: Sequence[Tensor], names: Sequence[str] | None) -> Memory:
        return {
            "average": torch.zeros_like(rows[0]),
            "calls": torch.zeros((), dtype=torch.int64, device=rows[0].device),
        }

    def _step(self, rows: Sequence[Tensor], memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        a = self.anchor_index(len(rows), names)
        m = memory["average"].lerp(rows[a], share_of_present(self.rho, memory["calls"], rows[0]))
        auxiliary = torch.zeros_like(m)
        for k, row in enumerate(rows):
            if k != a:
                auxiliary += row
        (square, along), _ = products([m, auxiliary])
        return rows[a] + self.lam * (auxiliary - quotient(along, square).to(m.dtype) * m), {
            "average": m,
            "calls": memory["calls"] + 1,
        }

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return 1 for the anchor and ``lam`` for every auxiliary."""
        a = self.anchor_index(len(names), names)
        return tuple(1.0 if k == a else self.lam for k in range(len(names)))
