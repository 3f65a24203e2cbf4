"""Random weights: a new draw from the simplex at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.rules.kinds import RandomRule


@dataclass(frozen=True, eq=False)
class RandomWeights(RandomRule):
    """Draw the weights anew at every call: w = softmax(z), z standard normal.

    Guarantees: none about conflict; w > 0, sum w = 1, and 1/K on average. The baseline that every rule should beat.

    Args:
        seed: Seed of the rule's own generator; each block has a draw of its own.

    References:
        Lin et al., Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning, TMLR 2022,
        arXiv:2111.10603, Section 3.2 (RLW, normal distribution).

    >>> RandomWeights()(torch.eye(3)).sum()
    tensor(1.)
    """

    name: ClassVar[str] = "random-weights"
    equivariant: ClassVar[bool] = False  # drawn for positions

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        z = torch.randn(G.shape[:-1], generator=self._generator, dtype=torch.float64)
        return z.softmax(-1).to(G.device, G.dtype, non_blocking=True)
