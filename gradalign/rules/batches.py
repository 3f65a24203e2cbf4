"""Loss groups of two or three batches in one Gramian, for rules whose paper samples twice.

The K groups are laid out batch by batch: all losses on the first batch, then all on the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.errors import positive_integer
from gradalign.rules.base import listed
from gradalign.rules.kinds import Memory, StatefulRule

_MOST = 3


@dataclass(frozen=True, eq=False)
class BatchedRule(StatefulRule):
    """A rule that moves weights from call to call by the products of two batches' gradients, A = J_1 J_2'.

    Args:
        batches: 1: A = G. 2: the groups are laid out (a1, b1, .., a2, b2, ..), A is the block between the batches, and
            the step is the mean over both. 3: the same, and the step is the third batch's alone.
    """

    batches: int = field(default=1, kw_only=True)

    remembers: ClassVar[tuple[str, ...]] = ("weights",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if positive_integer("batches", self.batches) > _MOST:
            raise ValueError(f"`batches` must be 1, 2 or 3, got {self.batches}.")

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless every batch has the same number of groups."""
        super().check_groups(num_groups, names)
        if num_groups % self.batches:
            raise ValueError(
                f"`{type(self).__name__}` must have the same losses on each of the {self.batches} batches, got"
                f" {num_groups} loss groups{listed(names)}; lay them out batch by batch."
            )

    def _begin(self, G: Tensor) -> Memory:
        n = G.shape[-1] // self.batches
        return {"weights": torch.full_like(G[..., :n, 0], 1 / n)}

    def _between(self, G: Tensor) -> Tensor:
        """Return A, (..., n, n) for the n losses of one batch."""
        n = G.shape[-1] // self.batches
        return G if self.batches == 1 else G[..., :n, n : 2 * n]

    def _plain(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Return numbers for all groups from those of the losses of one batch, as ``_spread`` does."""
        return tuple(self._spread(torch.tensor(weights, dtype=torch.float64)).tolist())

    def _spread(self, w: Tensor) -> Tensor:
        """Return the weights (..., K) of all groups from those of the n losses."""
        if self.batches == 1:
            return w
        if self.batches == _MOST:
            return torch.cat([torch.zeros_like(w), torch.zeros_like(w), w], -1)
        return torch.cat([w / 2, w / 2], -1)
