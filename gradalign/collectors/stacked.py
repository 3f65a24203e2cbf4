"""The stacked collector: every group's gradient is kept as a row, so that any weights can combine them.

Shapes: K groups, T parameters, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gradalign.collectors.base import Collector, Loss, Owner, Row, is_exclusive, large
from gradalign.collectors.combine import CombinePlan
from gradalign.collectors.parameters import MOST_WHOLE, OUTSIDE, Layout
from gradalign.gramian import GramianPlan, accumulation_dtype, largest_whole, make_scratch

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

    Either way a step holds what ``loss.backward()`` holds and K - 1 gradients more, of which those of parameters that
    a group does not reach cost nothing: neither memory nor time.

    Args:
        layout: The parameters and their blocks.
        num_groups: K.
        shared_only: Parameters that a single group reaches count as outside the scope.
    """

    name: ClassVar[str] = "stacked"

    def __init__(self, layout: Layout, num_groups: int, *, shared_only: bool = False) -> None:
        super().__init__(layout, num_groups, shared_only=shared_only)
        numbers = range(len(layout.parameters))
        hookable = large(layout.sizes) if num_groups > 1 else []  # a single group's gradients become p.grad as they are
        self._hooked = [i for i in hookable if layout.parameters[i].device.type == "cpu"]
        whole = min(MOST_WHOLE, *(largest_whole(num_groups, p.device) for p in layout.parameters))
        self._flat = [i for i in numbers if layout.sizes[i] > whole]
        self._buffers: list[dict[int, Tensor]] = [{} for _ in range(num_groups)]
        self._scratch: dict[torch.device, Tensor] = {}
        self._plan_key: object = None
        self._plans: list[_Plan] = []
        self._rows: list[Row] = []
        self._leads: list[Any] = []  # for each parameter the first group that reaches it, None as long as none does
        self._owner = Owner(layout)

    def _collect(self, losses: Sequence[Loss]) -> None:
        nothing: Row = [None] * len(self.layout.parameters)
        if not self.pending:
            self._rows = [list(nothing) for _ in losses]
            self._leads = [None] * len(nothing)
        for k, loss in enumerate(losses):
            taken: list[int] = []
            gradients = self._differentiate(
                loss, retain_graph=k + 1 < len(losses), take=self._taker(k, taken), hooked=self._hooked
            )
            self._store(k, gradients, set(taken))

    def _taker(self, k: int, taken: list[int]) -> Callable[[int, Tensor], bool]:
        """Return what moves a gradient of group k, fresh from backward, into its row."""
        row = self._rows[k]

        def take(i: int, gradient: Tensor) -> bool:
            if row[i] is not None:
                row[i].add_(gradient)
            elif self._leads[i] is None and gradient.nbytes >= _PAGES_OF_ITS_OWN:
                return False
            else:
                row[i] = self._memory(k, i).copy_(gradient)
                if self._leads[i] is None:
                    self._leads[i] = k
            taken.append(i)
            return True

        return take

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
        for i in new:
            row[i], gradients[i] = gradients[i], None
        self._owner.own(row, first)
        if old:
            self._owner.own(row, [i for i in old if self._leads[i] != k])
            torch._foreach_add_([row[i] for i in old], [gradients[i] for i in old])

    def row(self, k: int) -> Row:
        """Return the gradient of group k, (T,), None where it does not reach a parameter."""
        return self._rows[k]

    def counts(self) -> list[int]:
        """Return for each parameter how many groups reach it."""
        return [sum(gradient is not None for gradient in column) for column in zip(*self._rows, strict=True)]

    @torch.no_grad()
    def gramians(self) -> tuple[Tensor, Tensor]:
        """Return the Gramians of the blocks, (B, K, K), and that of the parameters outside the scope, (K, K)."""
        device = self.layout.parameters[0].device
        shape = (self.layout.num_blocks + 1, self.num_groups, self.num_groups)
        G = torch.zeros(shape, dtype=accumulation_dtype(device), device=device)
        for plan in self._planned():
            plan.add_gramian(G[plan.block], self._rows)
        return G[:-1], G[OUTSIDE]

    @torch.no_grad()
    def write(self, weights: Tensor, support: Sequence[int], plain: Sequence[float]) -> None:
        """Add the weighted sum of the rows to ``p.grad`` of every parameter that a group reaches.

        Args:
            weights: (B, K), each block's weights.
            support: The groups whose weight can differ from zero; the other rows are not read.
            plain: K numbers, the weights outside the scope.
        """
        outside = torch.stack([weights.new_full((), weight) for weight in plain])
        table = torch.cat([weights, outside.unsqueeze(0)])  # the last row is OUTSIDE's
        for plan in self._planned():
            plan.combine(
                self._rows, list(table[plan.block]), range(self.num_groups) if plan.block == OUTSIDE else support
            )
        self._deposit([None if k is None else self._rows[k][i] for i, k in enumerate(self._leads)])
        self.discard()

    @torch.no_grad()
    def write_rows(self, align: Callable[[int, list[Tensor]], Tensor], plain: Sequence[float]) -> None:
        """Add to ``p.grad`` what a function of the rows themselves makes of them, block by block.

        Args:
            align: Maps a block's number and its K rows (P,) to the aligned gradient (P,). It must not change them.
            plain: K numbers, the weights outside the scope.
        """
        for plan in self._planned():
            if plan.block == OUTSIDE:
                weights = [plan.scratch.new_full((), weight) for weight in plain]
                plan.combine(self._rows, weights, range(self.num_groups))
        blocks: dict[int, list[int]] = {}  # with parameters that nothing reaches, so that a row's length stays
        for i, block in enumerate(self._blocks()):
            blocks.setdefault(block, []).append(i)
        blocks.pop(OUTSIDE, None)
        for block, members in blocks.items():
            aligned = align(block, [self._joined(row, members) for row in self._rows])
            parts = aligned.split([self.layout.sizes[i] for i in members])
            for i, part in zip(members, parts, strict=True):
                if self._leads[i] is not None:
                    lead = self._rows[self._leads[i]][i]
                    lead.copy_(part.view(lead.shape))
        self._deposit([None if k is None else self._rows[k][i] for i, k in enumerate(self._leads)])
        self.discard()

    def _joined(self, row: Row, members: Sequence[int]) -> Tensor:
        """Return one flat row (P,) of these parameters' gradients, in the widest of their dtypes."""
        parameters = [self.layout.parameters[i] for i in members]
        dtype = parameters[0].dtype
        for parameter in parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        joined = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
        for i, place in zip(members, joined.split([p.numel() for p in parameters]), strict=True):
            gradient = row[i]
            if gradient is not None:
                place.view(gradient.shape).copy_(gradient)
        return joined

    def discard(self) -> None:
        """Drop the gradients in the rows."""
        super().discard()
        self._rows, self._leads = [], []
        self._owner = Owner(self.layout)

    def _planned(self) -> list[_Plan]:
        """Return the plans for what the groups reach now, those of the last step where that is the same."""
        reach = [[gradient is None for gradient in row] for row in self._rows]
        if (reach, self._leads) != self._plan_key:
            self._plan_key = (reach, self._leads)
            kinds: dict[_Kind, list[int]] = {}
            for i, (lead, block) in enumerate(zip(self._leads, self._blocks(), strict=True)):
                if lead is not None:
                    groups = tuple(k for k, absent in enumerate(reach) if not absent[i])
                    kind = _Kind(block, groups, lead, self.layout.parameters[i].dtype, self.layout.parameters[i].device)
                    kinds.setdefault(kind, []).append(i)
            flat = set(self._flat)
            self._plans = [
                _Plan(kind, members, self.layout, flat, self._scratch_on(kind.device), self.num_groups)
                for kind, members in kinds.items()
            ]
        return self._plans

    def _scratch_on(self, device: torch.device) -> Tensor:
        if device not in self._scratch:
            self._scratch[device] = make_scratch(device, self.num_groups)
        return self._scratch[device]


class _Kind(NamedTuple):
    """What parameters share whose rows are multiplied and summed together."""

    block: int
    groups: tuple[int, ...]
    lead: int
    dtype: torch.dtype
    device: torch.device


class _Plan:
    """How the rows of some parameters are multiplied and summed, for one pattern of what the groups reach."""

    def __init__(
        self, kind: _Kind, members: list[int], layout: Layout, flat: set[int], scratch: Tensor, num_groups: int
    ) -> None:
        self.block = kind.block
        self.members = members
        self.scratch = scratch
        self._kind = kind
        self._layout = layout
        self._flat = [i in flat for i in members]
        shapes = [
            (layout.sizes[i],) if is_flat else layout.parameters[i].shape
            for i, is_flat in zip(members, self._flat, strict=True)
        ]
        self._gramian = GramianPlan(shapes, len(kind.groups), scratch)
        self._combine = CombinePlan(shapes, kind.device)
        places = [num_groups * i + j for i in kind.groups for j in kind.groups]
        self._places = None if len(kind.groups) == num_groups else torch.tensor(places, device=kind.device)

    def add_gramian(self, G: Tensor, rows: Sequence[Row]) -> None:
        """Add the Gramian of these parameters to G (K, K)."""
        part = self._gramian([self._parts(rows[k]) for k in self._kind.groups])
        if self._places is None:
            G += part.to(G.device)
        else:
            G.view(-1).index_add_(0, self._places.to(G.device), part.view(-1).to(G.device))

    def combine(self, rows: Sequence[Row], weights: Sequence[Tensor], support: Sequence[int]) -> None:
        """Form the weighted sum of the rows of ``support`` in place of the lead's."""
        present = [k for k in self._kind.groups if k in support]
        parts = {k: self._parts(rows[k]) for k in {*present, self._kind.lead}}
        self._combine(parts[self._kind.lead], [parts[k] for k in present], [weights[k] for k in present])

    def _parts(self, row: Row) -> list[Tensor]:
        return [
            self._layout.flat(i, row[i]) if is_flat else row[i]
            for i, is_flat in zip(self.members, self._flat, strict=True)
        ]
