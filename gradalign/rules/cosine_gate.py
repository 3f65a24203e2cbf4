"""Gradient-cosine gate: an auxiliary joins in as far as its gradient agrees with the main one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradalign.algebra import cosines
from gradalign.errors import flag
from gradalign.rules.kinds import AnchoredRule


@dataclass(frozen=True, eq=False)
class CosineGate(AnchoredRule):
    """Weight each auxiliary gradient by its cosine with the anchor's, and drop those that conflict.

    w_a = 1; w_k = max(0, cos(g_k, g_a)), or with ``hard`` 1 where cos(g_k, g_a) >= 0, else 0.

    Guarantees: <d, g_a> >= norm(g_a)^2: the anchor's loss falls at least as fast as on its own gradient.

    Args:
        hard: Take or leave each auxiliary whole, the paper's unweighted version.
        anchor: The main group's index or name.

    Note:
        A zero gradient has the cosine 0 with everything.

    References:
        Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018, arXiv:1812.02224, Algorithms 1 and 2.

    >>> import torch
    >>> CosineGate()(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))  # cos = 1 / (2 * 1)
    tensor([1.0000, 0.5000])
    """

    hard: bool = False

    name: ClassVar[str] = "cosine-gate"
    min_groups: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("hard", self.hard)

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        a = self.anchor_index(G.shape[-1], names)
        C, _, _ = cosines(G)
        w = (G[..., a] >= 0).to(G.dtype) if self.hard else C[..., a].clamp(min=0)
        w[..., a] = 1.0
        return w

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return ones: the sum that the gate lets through whole where the gradients agree."""
        return (1.0,) * len(names)
