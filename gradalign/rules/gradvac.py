"""GradVac: gradients are turned towards one another until they are as similar as they used to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import lengths, quotient, rounding
from gradalign.errors import finite_number
from gradalign.rules.kinds import Memory, Random, StatefulRule

_PARALLEL = 1 - 1e-8  # the largest target: a cosine of 1 would take a step without end


@dataclass(frozen=True, eq=False)
class GradVac(Random, StatefulRule):
    """Turn each gradient towards those that it is less similar to than usual, and add the results.

    For each group i start from c = e_i; for the other groups j in random order, with phi = cos(J'c, g_j) and the
    target t_ij: if phi < t_ij, c_j <- c_j + norm(J'c) (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (norm(g_j)
    sqrt(1 - t^2)), after which the cosine is t; then t_ij <- (1 - beta) t_ij + beta phi, at every pair. w is the sum
    of the K vectors c.

    Guarantees: none about conflict beyond PCGrad's, which the first call equals, for the targets begin at 0.

    Args:
        beta: Share of the present cosine in the targets, in [0, 1].
        seed: Seed of the rule's own generator, which draws the orders.

    Note:
        A pair with a zero gradient is passed over and its target kept. Targets are taken to be at most 1 - 1e-8,
        or what the dtype can tell from 1.

    References:
        Wang et al., Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
        Models, ICLR 2021, arXiv:2010.05874, Algorithm 1.

    >>> GradVac()(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))  # the first call: PCGrad
    tensor([2.0000, 1.2500])
    """

    beta: float = 0.5

    name: ClassVar[str] = "gradvac"
    equivariant: ClassVar[bool] = False  # the orders are drawn for positions
    remembers: ClassVar[tuple[str, ...]] = ("targets",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "beta", finite_number("beta", self.beta, 0.0, 1.0))

    def _begin(self, G: Tensor) -> Memory:
        return {"targets": torch.zeros_like(G)}

    def _step(self, G: Tensor, memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        K = G.shape[-1]
        orders = self._orders(G)
        targets = memory["targets"].gather(-1, orders)  # (..., K, K - 1): each pair comes once
        t = targets.clamp(max=min(_PARALLEL, 1 - 4 * torch.finfo(G.dtype).eps))
        sizes, least = lengths(G).unsqueeze(-2), rounding(G)
        norms = sizes.expand_as(G).gather(-1, orders)
        inverse = quotient(torch.ones_like(norms), norms)  # 0 for a zero gradient: no step towards it
        others = G.unsqueeze(-3).expand(*G.shape, K).gather(-2, orders.unsqueeze(-1).expand(*orders.shape, K))
        rounds = zip(
            orders.unsqueeze(-1).unbind(-2),
            t.unbind(-1),
            (t / (1 - t * t).sqrt()).unbind(-1),
            inverse.unbind(-1),
            others.unbind(-2),
            strict=True,
        )
        C = torch.eye(K, dtype=G.dtype, device=G.device).expand(G.shape).clone()  # row i: group i's c
        products = G.clone()  # C G
        cosines, remainders = [], []
        for at, target, cotangent, inverse_norm, row in rounds:  # at (..., K, 1): for each group i the next j
            square = (C * products).sum(-1)
            # What is left of gradients that cancelled is rounding: it has no direction.
            length = square.where(square > least * (C.abs() * sizes).sum(-1).square(), 0.0).sqrt()
            along = products.gather(-1, at).squeeze(-1) * inverse_norm
            phi = quotient(along, length).clamp(-1.0, 1.0)
            step = length * inverse_norm * (cotangent * (1 - phi * phi).sqrt() - phi)
            step = torch.where(phi < target, step, 0.0).unsqueeze(-1)
            C.scatter_add_(-1, at, step)
            products.addcmul_(step, row)
            cosines.append(phi)
            remainders.append(length)
        if K == 1:
            return C.sum(-2), memory
        seen = (torch.stack(remainders, -1) > 0) & (norms > 0)
        moved = torch.where(seen, targets.lerp(torch.stack(cosines, -1), self.beta), targets)
        return C.sum(-2), {"targets": memory["targets"].scatter(-1, orders, moved)}

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return ones: without conflict the first step is the sum."""
        return (1.0,) * len(names)
