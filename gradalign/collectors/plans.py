"""How the rows of some parameters are multiplied and summed together, for one pattern of what the groups reach.

Shapes: K groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradalign.collectors.combine import CombinePlan
from gradalign.collectors.parameters import Layout
from gradalign.collectors.row_sparse import RowSparse, union
from gradalign.distributed import Row
from gradalign.gramian import GramianPlan

Parts = list[Tensor]
"""A row's parts: whole gradients where they are small, else flat ones."""


class Kind(NamedTuple):
    """What parameters share whose rows are multiplied and summed together."""

    block: int
    groups: tuple[int, ...]
    lead: int
    dtype: torch.dtype
    device: torch.device
    copies: int


class Plan(ABC):
    """How rows go through the scratch and are summed in place of the lead's.

    Args:
        kind: What the parameters share.
        shapes: The parts' shapes.
        scratch: From ``make_scratch``.
        num_groups: K.
    """

    def __init__(self, kind: Kind, shapes: Sequence[Sequence[int]], scratch: Tensor, num_groups: int) -> None:
        self.kind = kind
        self.scratch = scratch
        self._gramian = GramianPlan(shapes, len(kind.groups), scratch)
        self._combine = CombinePlan(shapes, kind.device)
        places = [num_groups * i + j for i in kind.groups for j in kind.groups]
        self._places = None if len(kind.groups) == num_groups else torch.tensor(places, device=kind.device)

    @abstractmethod
    def parts(self, rows: Sequence[Row], k: int) -> Parts:
        """Return the parts of group k's row."""

    def add_gramian(self, G: Tensor, rows: Sequence[Row]) -> None:
        """Add the Gramian of these parameters to G (K, K)."""
        part = self._gramian([self.parts(rows, k) for k in self.kind.groups])
        if self.kind.copies > 1:
            part /= self.kind.copies
        if self._places is None:
            G += part.to(G.device)
        else:
            G.view(-1).index_add_(0, self._places.to(G.device), part.view(-1).to(G.device))

    def combine(self, rows: Sequence[Row], weights: Sequence[Tensor], support: Sequence[int]) -> None:
        """Form the weighted sum of the rows of ``support`` in place of the lead's."""
        present = [k for k in self.kind.groups if k in support]
        parts = {k: self.parts(rows, k) for k in {*present, self.kind.lead}}
        self._combine(parts[self.kind.lead], [parts[k] for k in present], [weights[k] for k in present])


class DensePlan(Plan):
    """The plan of parameters whose gradients lie in memory as the layout says; it serves many steps.

    Args:
        kind: What the parameters share.
        members: Their numbers.
        layout: All parameters.
        flat: The numbers of those whose gradients are taken as they lie in memory.
        scratch: From ``make_scratch``.
        num_groups: K.
    """

    def __init__(
        self, kind: Kind, members: Sequence[int], layout: Layout, flat: set[int], scratch: Tensor, num_groups: int
    ) -> None:
        self._layout = layout
        self._members = [(i, i in flat) for i in members]
        shapes = [(layout.sizes[i],) if is_flat else layout.parameters[i].shape for i, is_flat in self._members]
        super().__init__(kind, shapes, scratch, num_groups)

    def parts(self, rows: Sequence[Row], k: int) -> Parts:
        """Return the parts of group k's row."""
        return [self._layout.flat(i, rows[k][i]) if is_flat else rows[k][i] for i, is_flat in self._members]


class RowSparsePlan(Plan):
    """The plan of one parameter whose gradients are row-sparse; it serves the step whose gradients it is made from.

    Args:
        kind: What is known of the parameter.
        i: Its number.
        rows: K rows. The lead's gradient is a tensor (V, D), the others' are ``RowSparse``.
        touched: The rows that the lead touches, (n,).
        scratch: From ``make_scratch``.
        num_groups: K.
    """

    def __init__(
        self, kind: Kind, i: int, rows: Sequence[Row], touched: Tensor, scratch: Tensor, num_groups: int
    ) -> None:
        self._i = i
        of_groups = {k: rows[k][i] for k in kind.groups if k != kind.lead}
        of_groups[kind.lead] = RowSparse(touched, rows[kind.lead][i].index_select(0, touched))
        self._index = union([gradient.index for gradient in of_groups.values()])
        self._parts = {k: [gradient.on(self._index).view(-1)] for k, gradient in of_groups.items()}
        super().__init__(kind, [self._parts[kind.lead][0].shape], scratch, num_groups)

    def parts(self, rows: Sequence[Row], k: int) -> Parts:
        """Return the elements of group k's gradient in the rows that any group touches."""
        return self._parts[k]

    def combine(self, rows: Sequence[Row], weights: Sequence[Tensor], support: Sequence[int]) -> None:
        """Form the weighted sum of the rows of ``support`` in place of the lead's; where all are zero it stays zero."""
        super().combine(rows, weights, support)
        lead = rows[self.kind.lead][self._i]
        (summed,) = self._parts[self.kind.lead]
        lead.index_copy_(0, self._index, summed.view(-1, lead.shape[1]))
