"""Weighted sums of rows that come in parts, formed in place of one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradalign.gramian import fill

# Elements that are summed at once. On a CPU the sum then stays in a core's cache while the rows pass by; on an
# accelerator few launches count, and a product of a row and its weight needs memory for as many elements.
_CPU_ROOM = 2**16
_ACCELERATOR_ROOM = 2**23


class CombinePlan:
    """How rows whose parts have these shapes are summed, made once and used at every step.

    Args:
        shapes: The parts' shapes, the same in every row. A part of more than ``largest_whole`` elements has to be flat.
        device: The parts' device.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], device: torch.device) -> None:
        self._on_host = device.type == "cpu"
        self._fillings = fill(shapes, _CPU_ROOM if self._on_host else _ACCELERATOR_ROOM)

    def __call__(self, target: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], weights: Sequence[Tensor]) -> None:
        """Write the weighted sum of the rows into ``target``; half precision sums in float32.

        Args:
            target: Parts that are overwritten. They may be those of one of the rows.
            rows: The rows to sum, each with its parts; none for a sum of zero.
            weights: A 0-dimensional tensor for each row, read on its device, never on the host by an accelerator.
        """
        if not rows:
            torch._foreach_zero_(list(target))
            return
        # The target is overwritten first: where it is a row, that row has to come first.
        order = sorted(range(len(rows)), key=lambda k: rows[k] is not target)
        kind = target[0].dtype
        wide = torch.promote_types(kind, torch.float32)
        w = [weights[k].to(target[0].device, wide) for k in order]
        if len(order) == 1 and rows[0] is target and self._on_host and float(w[0]) == 1.0:
            return
        for filling in self._fillings:
            into = [piece.of(target) for piece in filling]
            pieces = [[piece.of(rows[k]) for piece in filling] for k in order]
            if wide != kind:
                total = [part.to(wide) for part in pieces[0]]
                self._sum(total, [[part.to(wide) for part in row] for row in pieces[1:]], w)
                torch._foreach_copy_(into, total)
                continue
            if rows[order[0]] is not target:
                torch._foreach_copy_(into, pieces[0])
            self._sum(into, pieces[1:], w)

    def _sum(self, total: list[Tensor], rows: list[list[Tensor]], weights: Sequence[Tensor]) -> None:
        """Multiply ``total`` by the first weight, and add the rows times the others."""
        torch._foreach_mul_(total, weights[0])
        for row, weight in zip(rows, weights[1:], strict=True):
            if self._on_host:
                torch._foreach_add_(total, row, alpha=float(weight))
            else:
                torch._foreach_add_(total, torch._foreach_mul(row, weight))
