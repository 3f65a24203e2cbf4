"""The batched collector: the backwards of all groups at once, by vmap.

Shapes: K groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import ClassVar

import torch

from gradalign.collectors.base import Loss, check_gradients, reaches_nothing
from gradalign.collectors.graphs import leads_to
from gradalign.collectors.stacked import StackedCollector
from gradalign.distributed import Row

_ENOUGH = 160  # characters of torch's error: some list every backend there is


class BatchedCollector(StackedCollector):
    """Keep K gradients as the stacked collector does, and take them in one backward over K cotangents.

    Where single operations are too small to fill the machine, K backwards one after the other wait for their launches,
    and this one does not; elsewhere it is the slower way, and holds what backward passes on K times. Which groups
    reach a parameter it does not tell: where one does, the others have a gradient of zero there.

    Args:
        layout: The parameters and their blocks.
        num_groups: K.
    """

    name: ClassVar[str] = "batched"

    def _collect(self, losses: Sequence[Loss]) -> None:
        self._begin()
        for k, gradients in enumerate(self._all_at_once(losses)):
            self._store(k, gradients, set())

    def _all_at_once(self, losses: Sequence[Loss]) -> list[Row]:
        """Return the K rows of gradients."""
        parameters, K = self.layout.parameters, len(losses)
        terms = [term for _, group, _ in losses for term in group]
        cotangents = []
        for k, (_, group, factors) in enumerate(losses):
            for n, term in enumerate(group):
                cotangent = term.new_zeros(K, *term.shape)
                cotangent[k] = 1.0 if factors is None else factors[n]
                cotangents.append(cotangent)
        try:
            gradients = torch.autograd.grad(terms, parameters, cotangents, is_grads_batched=True, allow_unused=True)
        except RuntimeError as error:
            if "vmap" not in str(error) and "batch" not in str(error).lower():
                raise
            raise RuntimeError(
                "With collector='batched' every operator of the losses must have a backward that torch.vmap can take,"
                f" got {shorten(str(error), _ENOUGH)!r}; take collector='stacked'."
            ) from error
        for name, group, _ in losses:
            check_gradients(name, gradients)
            if not leads_to(group, parameters):  # its gradients are zeros, as vmap has it
                raise reaches_nothing(name)
        rows = [[None if gradient is None else gradient[k] for gradient in gradients] for k in range(K)]
        # What becomes p.grad has memory of its own, or it would keep that of all groups.
        rows[0] = [None if gradient is None else gradient.clone() for gradient in rows[0]]
        return rows
