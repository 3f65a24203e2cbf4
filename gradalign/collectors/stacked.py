"""The stacked collector: every group's gradient is kept as a row, so that any weights can combine them.

Shapes: K groups, T parameters, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradalign.collectors.base import Collector, Loss, large
from gradalign.collectors.ownership import Owner, is_exclusive
from gradalign.collectors.parameters import MOST_WHOLE, OUTSIDE, Layout
from gradalign.collectors.plans import DensePlan, Kind, Plan, RowSparsePlan
from gradalign.collectors.row_sparse import RowSparse, can_be_row_sparse, touched_rows, union
from gradalign.distributed import Row
from gradalign.gramian import accumulation_dtype, largest_whole, make_scratch

# Bytes from which the C library takes an allocation's pages from the system each time. A parameter's first gradient of
# that size stays as backward made it: to copy it saves nothing, and it would be held twice, beside all activations.
_PAGES_OF_ITS_OWN = 2**25


class StackedCollector(Collector):
    """Keep K gradients as rows, give their Gramians, and write a weighted sum of them into ``p.grad``.

    A parameter's first gradient is kept as autograd made it; the aligned gradient is formed in it, and it becomes
    ``p.grad``: so a gradient that the user kept from an earlier step never changes. The other groups' gradients are

    - on a CPU copied, as soon as backward has made each, into memory that is made once and used at every step, and
      dropped, so that backward makes the next one in memory that is still in the caches; all but small ones, which
      are cheaper to leave alone;
    - on an accelerator kept as autograd made them, for its allocator gives the same memory at every step.

    A matrix most of whose rows are zero, as an embedding's gradient is, costs on a CPU one look at its rows and then
    what the others cost: of the other groups these alone are kept, and they alone are multiplied and summed.

    Either way a step holds what ``loss.backward()`` holds and K - 1 gradients more, of which those of parameters that
    a group does not reach cost nothing: neither memory nor time.

    Args:
        layout: The parameters and their blocks.
        num_groups: K.
        shared_only: Parameters that a single group reaches count as outside the scope.
        must_reach: Every group has to reach a parameter on this rank.
    """

    name: ClassVar[str] = "stacked"

    def __init__(self, layout: Layout, num_groups: int, *, shared_only: bool = False, must_reach: bool = True) -> None:
        super().__init__(layout, num_groups, shared_only=shared_only, must_reach=must_reach)
        numbers = range(len(layout.parameters))
        hookable = large(layout.sizes) if num_groups > 1 else []  # a single group's gradients become p.grad as they are
        self._hooked = [i for i in hookable if layout.parameters[i].device.type == "cpu"]
        self._matrices = {i for i in numbers if can_be_row_sparse(layout.parameters[i])}
        whole = min(MOST_WHOLE, *(largest_whole(num_groups, p.device) for p in layout.parameters))
        self._flat = [i for i in numbers if layout.sizes[i] > whole]
        self._buffers: list[dict[int, Tensor]] = [{} for _ in range(num_groups)]
        self._scratch: dict[torch.device, Tensor] = {}
        self._plan_key: object = None
        self._plans: list[DensePlan] = []
        self._row_sparse_plans: list[RowSparsePlan] | None = None  # None: not made for what the rows hold now
        self._rows: list[Row] = []
        self._leads: list[Any] = []  # for each parameter the first group that reaches it, None as long as none does
        self._touched: dict[int, Tensor] = {}  # a parameter whose lead is row-sparse: the rows that it touches
        self._owner = self._new_owner()

    def _collect(self, losses: Sequence[Loss]) -> None:
        for k, loss in enumerate(losses):
            self.add(k, loss, retain_graph=k + 1 < len(losses))

    def add(self, k: int, loss: Loss, *, retain_graph: bool) -> None:
        """Differentiate group k, and add its gradient to that of earlier micro-batches."""
        self._begin()
        taken: list[int] = []
        gradients = self._differentiate(
            loss, retain_graph=retain_graph, take=self._taker(k, taken), hooked=self._hooked
        )
        self._store(k, gradients, set(taken))

    def _begin(self) -> None:
        """Make rows without gradients, unless there are some."""
        self._row_sparse_plans = None
        if not self._rows:
            T = len(self.layout.parameters)
            self._rows = [[None] * T for _ in range(self.num_groups)]
            self._leads = [None] * T

    def adopt(self, rows: Sequence[Row]) -> None:
        """Take K rows, memory of this collector's alone in the layout's strides, for what the losses' gradients are."""
        self.discard()
        self._rows = list(rows)
        self._leads = [
            next((k for k, gradient in enumerate(column) if gradient is not None), None)
            for column in zip(*rows, strict=True)
        ]

    def _taker(self, k: int, taken: list[int]) -> Callable[[int, Tensor], bool]:
        """Return what moves a gradient of group k, fresh from backward, into its row."""
        row = self._rows[k]

        def take(i: int, gradient: Tensor) -> bool:
            first = self._leads[i] is None
            index = self._look(i, gradient) if first or i in self._touched else None
            if row[i] is not None:
                self._add(k, i, gradient, index)
            elif first and (self._keep_touched(i, index) or gradient.nbytes >= _PAGES_OF_ITS_OWN):
                return False
            elif index is not None:
                row[i] = RowSparse(index, gradient.index_select(0, index))
            else:
                row[i] = self._memory(k, i).copy_(gradient)
                if first:
                    self._leads[i] = k
            taken.append(i)
            return True

        return take

    def _look(self, i: int, gradient: Tensor) -> Tensor | None:
        """Return the rows that a gradient of parameter i touches where it is row-sparse, else None."""
        return touched_rows(gradient) if i in self._matrices and self.layout.is_laid_out(i, gradient) else None

    def _keep_touched(self, i: int, index: Tensor | None) -> bool:
        """Note the rows that parameter i's lead touches, None for many; return whether they are few."""
        if index is None:
            self._touched.pop(i, None)
        else:
            self._touched[i] = index
        return index is not None

    def _add(self, k: int, i: int, gradient: Tensor, index: Tensor | None) -> None:
        """Add a gradient that touches the rows of ``index``, None for many, to that of earlier micro-batches."""
        sum_so_far = self._rows[k][i]
        if isinstance(sum_so_far, RowSparse):
            if index is not None:
                self._rows[k][i] = sum_so_far.plus(RowSparse(index, gradient.index_select(0, index)))
                return
            self._rows[k][i] = sum_so_far = sum_so_far.dense(self._memory(k, i))
        elif self._leads[i] == k and i in self._touched:
            self._keep_touched(i, None if index is None else union([self._touched[i], index]))
        sum_so_far.add_(gradient)

    def _memory(self, k: int, i: int) -> Tensor:
        """Return memory for group k's gradient of parameter i, that of the last step unless it is a ``p.grad`` now."""
        kept = self._buffers[k].get(i)
        if kept is None or not is_exclusive(kept):
            kept = self._buffers[k][i] = torch.empty_like(self.layout.parameters[i], requires_grad=False)
        return kept

    @torch.no_grad()
    def _store(self, k: int, gradients: Row, taken: set[int]) -> None:
        """Put the gradients of group k into its row, or add them to those of earlier micro-batches."""
        row = self._rows[k]
        for i in self._flat:
            gradient = gradients[i]
            if gradient is not None and i not in taken:
                gradients[i] = self.layout.laid_out(i, gradient)
        new = [i for i, gradient in enumerate(gradients) if gradient is not None and row[i] is None]
        old = [
            i for i, gradient in enumerate(gradients) if gradient is not None and row[i] is not None and i not in taken
        ]
        first = [i for i in new if self._leads[i] is None]
        for i in first:
            self._leads[i] = k
            if i not in self._hooked:
                self._keep_touched(i, self._look(i, gradients[i]))
        for i in new:
            row[i], gradients[i] = gradients[i], None
        self._owner.own(row, first)
        for i in old:
            self._touched.pop(i, None)
        if old:
            self._owner.own(row, [i for i in old if self._leads[i] != k])
            torch._foreach_add_([row[i] for i in old], [gradients[i] for i in old])

    def row(self, k: int) -> Row:
        """Return the gradient of group k, (T,), None where it does not reach a parameter."""
        for i in self._matrices:
            self._make_dense(k, i)
        return self._rows[k]

    def _make_dense(self, k: int, i: int) -> None:
        if isinstance(self._rows[k][i], RowSparse):
            self._rows[k][i] = self._rows[k][i].dense(self._memory(k, i))

    def counts(self) -> list[int]:
        """Return for each parameter how many groups reach it."""
        return [sum(gradient is not None for gradient in column) for column in zip(*self._rows, strict=True)]

    @torch.no_grad()
    def _gramians(self) -> tuple[Tensor, Tensor]:
        """Return the Gramians of the blocks, (B, K, K), and that of the parameters outside the scope, (K, K)."""
        device = self.layout.device
        shape = (self.layout.num_blocks + 1, self.num_groups, self.num_groups)
        G = torch.zeros(shape, dtype=accumulation_dtype(device), device=device)
        for plan in self._planned():
            plan.add_gramian(G[plan.kind.block], self._rows)
        return G[:-1], G[OUTSIDE]

    def write(self, weights: Tensor, support: Sequence[int], plain: Sequence[float]) -> None:
        """Add the weighted sum of the rows to ``p.grad`` of every parameter that a group reaches.

        Args:
            weights: (B, K), each block's weights.
            support: The groups whose weight can differ from zero; the other rows are not read.
            plain: K numbers, the weights outside the scope.
        """
        self._deposit(self.combined(weights, support, plain))
        self.discard()

    @torch.no_grad()
    def combined(self, weights: Tensor, support: Sequence[int], plain: Sequence[float]) -> Row:
        """Return the weighted sum of the rows, (T,), formed in place of one of them; arguments as for ``write``."""
        outside = torch.stack([weights.new_full((), weight) for weight in plain])
        table = torch.cat([weights, outside.unsqueeze(0)])  # the last row is OUTSIDE's
        for plan in self._planned():
            block = plan.kind.block
            plan.combine(self._rows, list(table[block]), range(self.num_groups) if block == OUTSIDE else support)
        return self._lead_row()

    @torch.no_grad()
    def write_rows(self, align: Callable[[int, list[Tensor]], Tensor], plain: Sequence[float]) -> None:
        """Add to ``p.grad`` what a function of the rows themselves makes of them, block by block.

        Args:
            align: Maps a block's number and its K rows (P,) to the aligned gradient (P,). It must not change them.
            plain: K numbers, the weights outside the scope.
        """
        for plan in self._planned():
            if plan.kind.block == OUTSIDE:
                weights = [plan.scratch.new_full((), weight) for weight in plain]
                plan.combine(self._rows, weights, range(self.num_groups))
        blocks: dict[int, list[int]] = {}  # with parameters that nothing reaches, so that a row's length stays
        for i, block in enumerate(self._blocks()):
            blocks.setdefault(block, []).append(i)
        blocks.pop(OUTSIDE, None)
        for block, members in blocks.items():
            joined = [self._joined(row, members) for row in self._rows]
            if self.scale is None:
                aligned = align(block, joined)
            else:
                scale = self.scale.to(joined[0].device)
                aligned = align(block, [row.div_(scale) for row in joined]) * scale
            parts = aligned.split([self.layout.sizes[i] for i in members])
            for i, part in zip(members, parts, strict=True):
                if self._leads[i] is not None:
                    lead = self._rows[self._leads[i]][i]
                    lead.copy_(part.view(lead.shape))
        self._deposit(self._lead_row())
        self.discard()

    def _joined(self, row: Row, members: Sequence[int]) -> Tensor:
        """Return one flat row (P,) of these parameters' gradients, in the widest of their dtypes."""
        parameters = [self.layout.parameters[i] for i in members]
        dtype = parameters[0].dtype
        for parameter in parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        joined = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
        for i, place in zip(members, joined.split([p.numel() for p in parameters]), strict=True):
            gradient, shape = row[i], self.layout.parameters[i].shape
            if isinstance(gradient, RowSparse):
                gradient.dense(place.view(shape))
            elif gradient is not None:
                place.view(shape).copy_(gradient)
        return joined

    def discard(self) -> None:
        """Drop the gradients in the rows."""
        super().discard()
        self._rows, self._leads, self._touched, self._row_sparse_plans = [], [], {}, None
        self._owner = self._new_owner()

    def _lead_row(self) -> Row:
        """Return for each parameter the gradient in place of which sums are formed."""
        return [None if k is None else self._rows[k][i] for i, k in enumerate(self._leads)]

    def _new_owner(self) -> Owner:
        return Owner(self.layout)

    def _planned(self) -> list[Plan]:
        """Return the plans for what the groups reach now, those of the last step where that is the same."""
        if self._row_sparse_plans is None:
            self._settle()
            key = ([[gradient is None for gradient in row] for row in self._rows], self._leads, set(self._touched))
            if key != self._plan_key:
                self._plan_key = key
                kinds: dict[Kind, list[int]] = {}
                for i, block in enumerate(self._blocks()):
                    if self._leads[i] is not None and i not in self._touched:
                        kinds.setdefault(self._kind(i, block), []).append(i)
                flat = set(self._flat)
                self._plans = [
                    DensePlan(kind, members, self.layout, flat, self._scratch_on(kind.device), self.num_groups)
                    for kind, members in kinds.items()
                ]
            blocks = self._blocks() if self._touched else ()
            self._row_sparse_plans = []
            for i, touched in self._touched.items():
                kind = self._kind(i, blocks[i])
                scratch = self._scratch_on(kind.device)
                self._row_sparse_plans.append(RowSparsePlan(kind, i, self._rows, touched, scratch, self.num_groups))
        return [*self._plans, *self._row_sparse_plans]

    def _settle(self) -> None:
        """Make a parameter's gradients dense unless those of all groups are row-sparse."""
        for i in self._matrices:
            if self._leads[i] is None:
                continue
            others = [row[i] for k, row in enumerate(self._rows) if k != self._leads[i] and row[i] is not None]
            if i not in self._touched or not all(isinstance(gradient, RowSparse) for gradient in others):
                self._touched.pop(i, None)
                for k in range(self.num_groups):
                    self._make_dense(k, i)

    def _kind(self, i: int, block: int) -> Kind:
        parameter = self.layout.parameters[i]
        groups = tuple(k for k, row in enumerate(self._rows) if row[i] is not None)
        return Kind(block, groups, self._leads[i], parameter.dtype, parameter.device, self.layout.copies[i])

    def _scratch_on(self, device: torch.device) -> Tensor:
        if device not in self._scratch:
            self._scratch[device] = make_scratch(device, self.num_groups)
        return self._scratch[device]
