"""Krum: the gradients that have the nearest neighbours, the others being suspect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.errors import positive_integer
from gradalign.rules.base import Rule, listed


@dataclass(frozen=True, eq=False)
class Krum(Rule):
    """Average the ``num_selected`` gradients that are nearest to their K - f - 2 nearest neighbours.

    The score of g_i is the sum of the K - f - 2 least norm(g_i - g_j)^2 = G_ii + G_jj - 2 G_ij over j != i, with
    f = ``num_byzantine``; w = 1/m for the m lowest scores, 0 for the others. With m = 1 it is Krum, else Multi-Krum.

    Guarantees: none about conflict; resists f gradients that are anything finite, where K > 2 f + 2.

    Args:
        num_byzantine: f >= 0, how many groups may be broken.
        num_selected: m >= 1, how many are averaged.

    Raises:
        ValueError: When called, K < f + 3 or K < m.

    Note:
        Among equal scores the lower index wins, as in the paper.

    References:
        Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS 2017,
        arXiv:1703.02757, Section 4.

    >>> Krum()(torch.tensor([[1.0, 1.0, 5.0], [1.0, 1.01, 5.0], [5.0, 5.0, 25.0]]))  # 1 and 1.005 are neighbours
    tensor([1., 0., 0.])
    """

    num_byzantine: int = 0
    num_selected: int = 1

    name: ClassVar[str] = "krum"
    min_groups: ClassVar[int] = 3
    equivariant: ClassVar[bool] = False  # ties go by position

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer("num_byzantine", self.num_byzantine, 0)
        positive_integer("num_selected", self.num_selected)

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        squares = G.diagonal(dim1=-2, dim2=-1)
        distances = (squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * G).clamp(min=0)
        distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)  # not one's own neighbour
        neighbours = G.shape[-1] - self.num_byzantine - 2
        scores = distances.sort(-1).values[..., :neighbours].sum(-1)
        selected = scores.argsort(dim=-1, stable=True)[..., : self.num_selected]
        return torch.zeros_like(scores).scatter(-1, selected, 1 / self.num_selected)

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless K >= num_byzantine + 3 and K >= num_selected."""
        super().check_groups(num_groups, names)
        least = max(self.num_byzantine + 3, self.num_selected)
        if num_groups < least:
            raise ValueError(
                f"`Krum` must have at least {least} loss groups for num_byzantine={self.num_byzantine} and"
                f" num_selected={self.num_selected}, got {num_groups}{listed(names)}; lower these, or add groups."
            )
