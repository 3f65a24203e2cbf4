"""Trimmed mean: element by element, the mean without the extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.errors import positive_integer
from gradalign.rules.base import listed
from gradalign.rules.rows import CHUNK, RowRule


@dataclass(frozen=True, eq=False)
class TrimmedMean(RowRule):
    """Drop, element by element, the ``trim`` largest and the ``trim`` smallest, and average the rest.

    Guarantees: none about conflict; resists ``trim`` groups that are anything finite.

    Args:
        trim: How many are dropped at either end, >= 0.

    Raises:
        ValueError: When called, K <= 2 trim.

    References:
        Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018,
        arXiv:1803.01498, Definition 2.

    >>> TrimmedMean()(torch.tensor([[1.0, 9.0], [2.0, 0.0], [50.0, 1.0]]))
    tensor([2., 1.])
    """

    trim: int = 1

    name: ClassVar[str] = "trimmed-mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer("trim", self.trim, 0)

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless K > 2 trim."""
        super().check_groups(num_groups, names)
        if num_groups <= 2 * self.trim:
            raise ValueError(
                f"`TrimmedMean` must have more than {2 * self.trim} loss groups for trim={self.trim}, got {num_groups}"
                f"{listed(names)}; lower trim, or add groups."
            )

    def _aligned(self, rows: Sequence[Tensor], names: Sequence[str] | None, block: int) -> Tensor:
        d = torch.empty_like(rows[0])
        for start in range(0, d.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            ordered = torch.stack([row[part] for row in rows]).sort(0).values
            d[part] = ordered[self.trim : len(rows) - self.trim].mean(0)
        return d
