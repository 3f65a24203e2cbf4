"""The stacked collector for parameters of which each rank holds a part.

Shapes: K groups, T parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradalign.collectors.agreement import agreed
from gradalign.collectors.base import Loss, check_gradients, explaining, post_hooks
from gradalign.collectors.ownership import Owner
from gradalign.collectors.parameters import OUTSIDE, Layout
from gradalign.collectors.stacked import StackedCollector
from gradalign.distributed import Row
from gradalign.sharding import Shards, like, local, local_gradient


class ShardedCollector(StackedCollector):
    """Keep of K gradients what this rank holds, and sum what their Gramians have in common.

    ``fully_shard`` averages and cuts gradients where ``loss.backward()`` leaves them, so that each group takes one, and
    ``p.grad`` is set aside meanwhile. A parameter that is no DTensor, or one on a part of the mesh, is averaged here
    over the rest.

    Args:
        layout: The parameters and their blocks.
        num_groups: K.
        shards: How the parameters lie on the mesh.
        shared_only: Parameters that a single group reaches count as outside the scope.
    """

    def __init__(self, layout: Layout, num_groups: int, shards: Shards, *, shared_only: bool = False) -> None:
        self._whole = layout.parameters
        self._shards = shards
        parts = Layout([local(p) for p in layout.parameters], layout.blocks, layout.num_blocks, shards.copies)
        super().__init__(parts, num_groups, shared_only=shared_only)
        self._hooked, self._matrices = [], set()

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters whose ``p.grad`` is written, whole."""
        return self._whole

    def check_targets(self) -> None:
        """Do nothing: all were checked before the ranks had sent anything."""

    def add(self, k: int, loss: Loss, *, retain_graph: bool) -> None:
        """Differentiate group k, and add its gradient to that of earlier micro-batches."""
        self._begin()
        self._store(k, self._averaged(loss[0], self._backward(loss, retain_graph=retain_graph)), set())

    @torch.no_grad()
    def _averaged(self, name: str, row: Row) -> Row:
        """Average what nobody has averaged; where this rank has no gradient and another has, it has zeros."""
        reached = agreed(self._shards.ranks, self.layout, name, row)
        for i, any_rank in enumerate(reached):
            if any_rank and row[i] is None:
                row[i] = torch.zeros_like(self.layout.parameters[i])
        plain = [i for i in self._shards.plain if reached[i]]
        for i in plain:
            row[i] = self.layout.laid_out(i, row[i])
        arriving = self._shards.ranks.average(self.layout, row, plain)
        for i, any_rank in enumerate(reached):
            if any_rank:
                row[i] = self._shards.average(i, row[i])
        arriving.wait()
        return row

    def _backward(self, loss: Loss, *, retain_graph: bool) -> Row:
        """Return this rank's parts of the gradients of one group, (T,)."""
        name, terms, factors = loss
        aside = [parameter.grad for parameter in self._whole]
        hooks = [post_hooks(parameter) for parameter in self._whole]
        held = [dict(of_parameter) for of_parameter in hooks]  # they are for what becomes p.grad
        try:
            for parameter, of_parameter in zip(self._whole, hooks, strict=True):
                parameter.grad = None
                of_parameter.clear()
            with explaining(name):
                torch.autograd.backward(terms, factors, retain_graph=retain_graph)
            gradients = [local_gradient(parameter) for parameter in self._whole]
        finally:
            for parameter, gradient, of_parameter, kept in zip(self._whole, aside, hooks, held, strict=True):
                parameter.grad = gradient
                of_parameter.update(kept)
        check_gradients(name, gradients, must_reach=False)  # another rank may
        return gradients

    @torch.no_grad()
    def _gramians(self) -> tuple[Tensor, Tensor]:
        blocks, outside = super()._gramians()
        G = self._shards.ranks.total(torch.cat([blocks, outside.unsqueeze(0)]))
        return G[:-1], G[OUTSIDE]

    def _new_owner(self) -> Owner:
        return Owner(self.layout, disjoint=True)  # fully_shard makes those of a module pieces of one storage

    def _deposit(self, aligned: Row) -> None:
        """Add the aligned gradients, (T,), to ``p.grad``; where there is none, they become it."""
        for parameter, part in zip(self._whole, aligned, strict=True):
            if part is None:
                continue
            if parameter.grad is None:
                parameter.grad = like(parameter, part.detach())
            else:
                parameter.grad.add_(like(parameter, part))
        self._run_hooks([p for p, part in zip(self._whole, aligned, strict=True) if part is not None])
