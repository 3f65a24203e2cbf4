"""ExcessMTL: losses that are farthest from where they could be gain weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import quotient
from gradalign.errors import finite_number
from gradalign.rules.kinds import Memory
from gradalign.rules.rows import CHUNK, StatefulRowRule


@dataclass(frozen=True, eq=False)
class ExcessMTL(StatefulRowRule):
    """Raise each group's weight by its excess risk, as a second-order expansion estimates it from the gradient.

    S_i <- S_i + g_i^2 element by element; E_i = sum g_i^2 / sqrt(S_i), in units of its first value;
    w_i <- w_i exp(lr E_i), scaled to the sum 1; d = sum_i w_i g_i.

    Guarantees: none about conflict; w >= 0, sum w = 1.

    Args:
        lr: Step size of the weights, >= 0, dimensionless.

    Note:
        The authors' code uses the first call for the unit alone, adds an epsilon to it, and scales the weights to the
        sum K. No epsilon is added: where S_i = 0 there is no excess, and a group whose first
        gradient was zero has none. sqrt(S) is what is kept, for squares would under- and overflow; it
        costs K gradients of memory, in the rule's state.

    References:
        He et al., Robust Multi-Task Learning with Excess Risks, ICML 2024, arXiv:2402.02009, Eq. 6 to 9.

    >>> ExcessMTL()(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([0.5000, 1.5000])
    """

    lr: float = 1.0

    name: ClassVar[str] = "excess-mtl"
    remembers: ClassVar[tuple[str, ...]] = ("roots", "first", "log_weights", "calls")
    elementwise: ClassVar[tuple[str, ...]] = ("roots",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lr", finite_number("lr", self.lr, 0.0))

    def _begin(self, rows: Sequence[Tensor], names: Sequence[str] | None) -> Memory:
        K, lead = len(rows), rows[0]
        return {
            "roots": lead.new_zeros(K, lead.numel()),
            "first": lead.new_zeros(K),
            "log_weights": lead.new_zeros(K),
            "calls": torch.zeros((), dtype=torch.int64, device=lead.device),
        }

    def _step(self, rows: Sequence[Tensor], memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        S = memory["roots"].clone()
        E = torch.zeros_like(memory["first"])
        for start in range(0, S.shape[-1], CHUNK):
            J = torch.stack([row[start : start + CHUNK] for row in rows])
            root = S[:, start : start + CHUNK]
            torch.hypot(root, J, out=root)
            E += (J * quotient(J, root)).sum(-1)
        first = torch.where(memory["calls"] == 0, E, memory["first"])
        ratio = quotient(E, first)
        log_weights = (memory["log_weights"] + self.lr * ratio).log_softmax(-1)
        w = log_weights.exp()
        d = torch.zeros_like(rows[0])
        for row, weight in zip(rows, w.unbind(), strict=True):
            d.addcmul_(row, weight)
        return d, {"roots": S, "first": first, "log_weights": log_weights, "calls": memory["calls"] + 1}
