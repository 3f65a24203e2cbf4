"""MoCo: MGDA's weights from gradients that are averaged over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import in_units
from gradalign.errors import finite_number, flag
from gradalign.rules.kinds import Memory
from gradalign.rules.rows import StatefulRowRule, products, share_of_present
from gradalign.solvers import project_onto_simplex


@dataclass(frozen=True, eq=False)
class MoCo(StatefulRowRule):
    """Track each gradient by an average, move the weights towards MGDA's for the averages, and step on these.

    y_i <- y_i + beta (g_i - y_i); w <- Proj(w - gamma (Y Y' + rho I) w); d = Y'w.

    Guarantees: none about conflict at a single step; the averages' noise vanishes where beta does, which corrects the
    bias of weights and gradients from one batch.

    Args:
        beta: Share of the present gradient in the averages, in (0, 1].
        gamma: Step size on the simplex, >= 0.
        rho: Pull towards equal weights, >= 0.
        relative: Divide Y Y' by its mean diagonal, so that ``gamma`` is dimensionless and the weights do not depend on
            the losses' scale. False is the paper's, where gamma has the unit of 1 / squared gradient norm.

    Note:
        The algorithm as it is printed; implementations differ in scaling gradients by losses and in the projection.
        The averages begin at the first gradients. They cost K gradients of memory, in the rule's state.

    References:
        Fernando et al., Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach, ICLR
        2023, arXiv:2210.12624, Algorithm 1.

    >>> MoCo(gamma=0.5)(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([0.5000, 0.5000])
    """

    beta: float = 0.5
    gamma: float = 0.1
    rho: float = 0.0
    relative: bool = field(default=True, kw_only=True)

    name: ClassVar[str] = "moco"
    remembers: ClassVar[tuple[str, ...]] = ("averages", "weights", "calls")
    elementwise: ClassVar[tuple[str, ...]] = ("averages",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("gamma", "rho"):
            object.__setattr__(self, key, finite_number(key, getattr(self, key), 0.0))
        beta = finite_number("beta", self.beta, 0.0, 1.0)
        if beta == 0:
            raise ValueError(f"`beta` must be in (0, 1], got {self.beta!r}; an average that never moves has no value.")
        object.__setattr__(self, "beta", beta)
        if not flag("relative", self.relative):
            object.__setattr__(self, "degree", math.nan)

    def _begin(self, rows: Sequence[Tensor], names: Sequence[str] | None) -> Memory:
        return {
            "averages": rows[0].new_zeros(len(rows), rows[0].numel()),
            "weights": rows[0].new_full((len(rows),), 1 / len(rows)),
            "calls": torch.zeros((), dtype=torch.int64, device=rows[0].device),
        }

    def _step(self, rows: Sequence[Tensor], memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        Y = memory["averages"].clone()
        share = share_of_present(self.beta, memory["calls"], rows[0])
        for average, row in zip(Y, rows, strict=True):
            average.lerp_(row, share)
        A = products(list(Y))
        A = in_units(A) if self.relative else A
        w = memory["weights"].to(A.dtype)
        w = project_onto_simplex(w - self.gamma * (A @ w + self.rho * w)).to(Y.dtype)
        return w @ Y, {"averages": Y, "weights": w, "calls": memory["calls"] + 1}
