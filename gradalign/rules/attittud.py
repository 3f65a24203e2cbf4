"""ATTITTUD: auxiliary gradients are taken apart along the directions that matter to the main task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import eigenvalues, rounding, wide
from gradalign.errors import finite_number, positive_integer
from gradalign.rules.kinds import AnchoredRule, check_group, group_index


@dataclass(frozen=True, eq=False)
class ATTITTUD(AnchoredRule):
    """Weight the good, the bad and the neutral part of each auxiliary gradient by numbers of their own.

    Directions v_1 .. v_r are the first right singular vectors of the basis groups' gradients, their rows. Of an
    auxiliary g, the components <g, v_j> v_j with the sign of <g_a, v_j> are good, the others bad, and what is
    orthogonal to all v_j is neutral: d = g_a + sum_k (good g_k+ + bad g_k- + neutral g_k0).

    Guarantees: with bad <= 0 and good >= 0, <d, g_a> >= norm(g_a)^2 where the directions span g_a. The defaults are
    twice AnchoredPCGrad(alpha=0.5).

    Args:
        rank: r, how many directions; None takes the rank of the basis.
        good: Weight of the parts that agree with the anchor.
        bad: Weight of those that do not; 0 drops them, -1 turns them round.
        neutral: Weight of what is orthogonal to the directions.
        basis: The indices or names of the groups that span the directions, say losses of single examples of the main
            task; none: the anchor alone. They are no auxiliaries: but for the anchor, they add nothing of themselves.
        anchor: The main group's index or name.

    Note:
        The paper draws the basis by a randomised decomposition of the main task's gradients by example. Given as loss
        groups, directions, components and d are all combinations of rows, so that G is enough. A component of length
        0, of either, is good. The decomposition waits for the device on CUDA.

    References:
        Dery et al., Auxiliary Task Update Decomposition: The Good, The Bad and The Neutral, ICLR 2021,
        arXiv:2108.11346, Section 3 and Algorithm 1.

    >>> ATTITTUD()(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))  # g_2 = -g_1 + neutral: d = g_1 + (g_2 + g_1)
    tensor([2., 1.])
    """

    rank: int | None = None
    good: float = 1.0
    bad: float = 0.0
    neutral: float = 1.0
    basis: Sequence[int | str] = field(default=(), kw_only=True)

    name: ClassVar[str] = "attittud"
    min_groups: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            positive_integer("rank", self.rank)
        for part in ("good", "bad", "neutral"):
            object.__setattr__(self, part, finite_number(part, getattr(self, part)))
        if isinstance(self.basis, str) or not isinstance(self.basis, Sequence):
            raise TypeError(f"`basis` must be a sequence of groups' indices or names, got {self.basis!r}.")
        for group in self.basis:
            check_group("basis", group)
        object.__setattr__(self, "basis", tuple(self.basis))

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless the anchor and the basis are among the groups."""
        super().check_groups(num_groups, names)
        self._basis_indices(num_groups, names)

    def _basis_indices(self, num_groups: int, names: Sequence[str] | None) -> list[int]:
        given = [group_index("basis", group, num_groups, names) for group in self.basis]
        return sorted(set(given)) or [self.anchor_index(num_groups, names)]

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        K = G.shape[-1]
        a = self.anchor_index(K, names)
        basis = self._basis_indices(K, names)
        W = wide(G)
        V = self._directions(W[..., basis, :][..., basis], rounding(G))  # (..., n, n): v_j on the basis
        components = V.mT @ W[..., basis, :]  # (..., n, K): <g_k, v_j>
        agree = components * components[..., a].unsqueeze(-1) >= 0
        # g_k less its components is neutral, so that each v_j enters with its part's weight less that of neutral.
        share = torch.where(agree, self.good - self.neutral, self.bad - self.neutral) * components
        auxiliary = [k for k in range(K) if k != a and k not in basis]
        w = torch.zeros_like(W[..., 0])
        w[..., auxiliary] = self.neutral
        w[..., basis] = (V @ share[..., auxiliary].sum(-1, keepdim=True)).squeeze(-1)
        w[..., a] += 1.0
        return w.to(G.dtype)

    def _directions(self, B: Tensor, least: float) -> Tensor:
        """Return orthonormal v_j as combinations of the basis rows, by columns (..., n, n), zero beyond the rank."""
        L, U = eigenvalues(B)
        kept = least * L[..., -1:] < L
        if self.rank is not None:
            kept[..., : max(0, B.shape[-1] - self.rank)] = False
        lengths: Tensor = torch.where(kept, L.rsqrt(), 0.0)
        directions: Tensor = U * lengths.unsqueeze(-2)
        return directions

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return 1 for the anchor, ``neutral`` for every auxiliary, 0 for the rest of the basis."""
        a = self.anchor_index(len(names), names)
        basis = self._basis_indices(len(names), names)
        return tuple(1.0 if k == a else 0.0 if k in basis else self.neutral for k in range(len(names)))
