"""SDMGrad: MGDA kept near a preferred direction, by stochastic steps on the simplex."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import times, wide
from gradalign.errors import finite_number, positive_integer
from gradalign.rules.base import listed
from gradalign.rules.batches import BatchedRule
from gradalign.rules.kinds import Memory, check_preference, fixed
from gradalign.solvers import project_onto_simplex


@dataclass(frozen=True, eq=False)
class SDMGrad(BatchedRule):
    """Descend on norm(J'(w + lam p))^2 over the simplex from the last weights, and mix in the preference.

    ``iterations`` times v <- momentum v + A (w + lam p), w <- Proj(w - lr v); the weights are
    (w + lam p) / (1 + lam). A = G, or of two batches J_1 J_2' (see ``batches``), divided by the squared mean norm.

    Guarantees: none about conflict. For lr small enough, and many iterations, d minimises norm(J'(w + lam p)), MGDA for
    lam = 0; the default lr is the authors', and too long for that.

    Args:
        lam: The paper's lambda, weight of the preference, >= 0.
        lr: Step size on the simplex, > 0, for A in units of the squared mean norm.
        momentum: In [0, 1).
        iterations: Steps a call.
        batches: How many batches the groups are laid out for: 1, 2 or 3; the paper has 3.
        preference: (K / batches,) numbers >= 0; equal ones of sum 1 where None.

    Note:
        With one batch the product of the two samples is biased, which the paper's proof excludes. The velocity starts
        at 0 in each call; the weights go on from the last call, 1/n each at first.

    References:
        Xiao et al., Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms, NeurIPS
        2023, arXiv:2305.18409, Algorithm 1.

    >>> SDMGrad()(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([0.5000, 0.5000])
    """

    lam: float = 0.3
    lr: float = 10.0
    momentum: float = 0.5
    iterations: int = 20
    preference: Sequence[float] | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "sdmgrad"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("lam", "lr", "momentum"):
            object.__setattr__(self, key, finite_number(key, getattr(self, key), 0.0))
        if self.momentum >= 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {self.momentum!r}.")
        positive_integer("iterations", self.iterations)
        if self.preference is not None:
            object.__setattr__(self, "preference", check_preference(self.preference))

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless the groups fill the batches, with one number of the preference for each loss."""
        super().check_groups(num_groups, names)
        if self.preference is not None and len(self.preference) * self.batches != num_groups:
            raise ValueError(
                f"`preference` must hold one number for each of the {num_groups // self.batches} losses of a"
                f" batch{listed(names)}, got {len(self.preference)}."
            )

    def _preference(self, num_groups: int) -> tuple[float, ...]:
        n = num_groups // self.batches
        return (1 / n,) * n if self.preference is None else tuple(self.preference)

    def _step(self, G: Tensor, memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        A = wide(self._between(G))
        p = fixed(self._preference(G.shape[-1]), A)
        squares = A.diagonal(dim1=-2, dim2=-1)
        norm = squares.clamp(min=0).sqrt().mean(-1)
        norm = norm.where(norm > 0, squares.abs().sqrt().mean(-1))  # of batches that contradict each other throughout
        A = A / norm.where(norm > 0, 1.0).square()[..., None, None]
        w, velocity = wide(memory["weights"]), torch.zeros_like(p)
        for _ in range(self.iterations):
            velocity = self.momentum * velocity + times(A, w + self.lam * p)
            w = project_onto_simplex(w - self.lr * velocity)
        mixed = (w + self.lam * p) / (1 + self.lam)
        return self._spread(mixed).to(G.dtype), {"weights": w.to(G.dtype)}

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the preference, over the batches that the step is taken on."""
        return self._plain(self._preference(len(names)))
