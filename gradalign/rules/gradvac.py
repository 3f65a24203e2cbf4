"""GradVac: gradients are turned towards one another until they are as similar as they used to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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

    Guarantees: none about conflict beyond Pproductsrad's, which the first call equals, for the targets begin at 0.

    Args:
        beta: Share of the present cosine in the targets, in [0, 1].
        seed: Seed of the rule's own generator, which draws the orders.

    Note:
        A pair with a zero gradient is passed over and its target kept. Targets are taken to be at most 1 - 1e-8.

    References:
        Wang et al., Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
        Models, ICLR 2021, arXiv:2010.05874, Algorithm 1.

    >>> GradVac()(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))  # the first call: Pproductsrad
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
        orders = self._orders(G)
        targets = memory["targets"].gather(-1, orders)  # (..., K, K - 1): each pair comes once
        t = targets.clamp(max=_PARALLEL)
        cotangents = t / (1 - t * t).sqrt()
        norms = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().unsqueeze(-2).expand_as(G).gather(-1, orders)
        C = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand(G.shape).clone()  # row i: group i's c
        products = G.clone()
        seen = []
        for n, j in enumerate(orders.unbind(-1)):  # (..., K): for each group i the next j
            at, norm = j.unsqueeze(-1), norms[..., n]
            length = (C * products).sum(-1).clamp(min=0).sqrt()
            exists = (length > 0) & (norm > 0)
            phi = (products.gather(-1, at).squeeze(-1) / (length * norm).where(exists, 1.0)).clamp(-1.0, 1.0)
            step = length * (cotangents[..., n] * (1 - phi * phi).sqrt() - phi) / norm.where(exists, 1.0)
            step = torch.where(exists & (phi < t[..., n]), step, 0.0).unsqueeze(-1)
            C.scatter_add_(-1, at, step)
            products.addcmul_(step, G.gather(-2, at.expand_as(G)))
            seen.append(torch.where(exists, phi, targets[..., n]))
        if seen:
            moved = targets.lerp(torch.stack(seen, -1), self.beta)
            memory = {"targets": memory["targets"].scatter(-1, orders, moved)}
        return C.sum(-2), memory

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return ones: without conflict the first step is the sum."""
        return (1.0,) * len(names)
