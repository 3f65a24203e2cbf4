"""The stacked collector for parameters of which each rank holds a part.

Shapes: K groups, T parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradalign.collectors.base import Loss, Owner, check_gradients, check_target, post_hooks
from gradalign.collectors.parameters import OUTSIDE, Layout
from gradalign.collectors.stacked import StackedCollector
from gradalign.distributed import Ranks, Row
from gradalign.sharding import Shards, is_sharded, like, local, local_gradient


class ShardedCollector(StackedCollector):
    """Keep of K gradients what this rank holds, and sum what their Gramians have in common.

    ``fully_shard`` averages and cuts gradients where ``loss.backward()`` leaves them, so that each group takes one, and
    ``p.grad`` is set aside meanwhile. A parameter that is no DTensor, or one on a part of the mesh, is averaged here
    over the rest.

    Args:
        layout: The parameters and their blocks.
        num_groups: K.
        ranks: The ranks that the user wants averaged over; None for no more than the mesh's.
        shared_only: Parameters that a single group reaches count as outside the scope.

    Raises:
        ValueError: The mesh does not hold all of these ranks.
    """

    def __init__(
        self, layout: Layout, num_groups: int, ranks: Ranks | None = None, *, shared_only: bool = False
    ) -> None:
        self._whole = layout.parameters
        self._shards = Shards(layout.parameters)
        if ranks is not None and ranks.size > self._shards.size:
            raise ValueError(
                f"`process_group` must be None, or no larger than the parameters' device mesh of {self._shards.size}"
                f" ranks, got {ranks.size} ranks; data parallelism beside tensor parallelism is a dimension of the mesh"
                " here: fully_shard the model over it."
            )
        parts = Layout([local(p) for p in layout.parameters], layout.blocks, layout.num_blocks, self._shards.copies)
        super().__init__(parts, num_groups, shared_only=shared_only)
        self._hooked, self._matrices = [], set()

    def add(self, k: int, loss: Loss, *, retain_graph: bool) -> None:
        """Differentiate group k, and add its gradient to that of earlier micro-batches."""
        self._begin()
        self._store(k, self._backward(loss, retain_graph=retain_graph), set())

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
            torch.autograd.backward(terms, factors, retain_graph=retain_graph)
            gradients = [local_gradient(parameter) for parameter in self._whole]
        finally:
            for parameter, gradient, of_parameter, kept in zip(self._whole, aside, hooks, held, strict=True):
                parameter.grad = gradient
                of_parameter.update(kept)
        check_gradients(name, gradients)
        return [None if g is None else self._shards.average(i, g) for i, g in enumerate(gradients)]

    @torch.no_grad()
    def _gramians(self) -> tuple[Tensor, Tensor]:
        blocks, outside = super()._gramians()
        G = self._shards.total(torch.cat([blocks, outside.unsqueeze(0)]))
        return G[:-1], G[OUTSIDE]

    def check_targets(self) -> None:
        """Raise ValueError where ``p.grad`` of a plain parameter cannot be added to in place."""
        for parameter, count in zip(self._whole, self.counts(), strict=True):
            if count and not is_sharded(parameter):
                check_target(parameter)

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
