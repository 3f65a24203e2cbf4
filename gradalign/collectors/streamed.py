"""The streamed collector: the anchor's gradient is kept, the others are reduced to products with it and dropped.

Shapes: K groups, T parameters, B blocks; a is the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.collectors.base import Collector, Loss, large
from gradalign.collectors.combine import CombinePlan
from gradalign.collectors.ownership import Owner
from gradalign.collectors.parameters import MOST_WHOLE, OUTSIDE, Layout
from gradalign.collectors.row_sparse import RowSparse, can_be_row_sparse, touched_rows, union
from gradalign.distributed import Row
from gradalign.gramian import GramianPlan, accumulation_dtype, make_scratch

# Elements of gradients that wait before they are reduced. On a CPU none: they are in the caches now; on an accelerator
# few launches count.
_CPU_WAIT = 1
_ACCELERATOR_WAIT = 2**22

_MORE_PLANS = 64


class StreamedCollector(Collector):
    """See every auxiliary through G_ka = <g_k, g_a> and its norm, and write the anchor's gradient, rescaled.

    The anchor is differentiated first. As backward makes an auxiliary's gradient, parameter by parameter, each is
    multiplied by the anchor's and dropped, so that no more than the anchor's gradient and a few single ones are ever
    held: what ``loss.backward()`` holds. Parameters outside the scope add up their groups' gradients with the plain
    weights at once. It serves steps of one micro-batch: for more, the auxiliaries' sums would be needed.

    Of a matrix most of whose rows are zero, as an embedding's gradient is, a CPU takes the others alone.

    Args:
        layout: The parameters and their blocks.
        num_groups: K.
        anchor: The anchor's index, the only group whose weight is not zero.
        plain: K numbers, the weights outside the scope.
        shared_only: Parameters that a single group reaches count as outside the scope.
    """

    name: ClassVar[str] = "streamed"

    def __init__(
        self, layout: Layout, num_groups: int, *, anchor: int, plain: Sequence[float], shared_only: bool = False
    ) -> None:
        super().__init__(layout, num_groups, shared_only=shared_only)
        self._anchor = anchor
        self._plain = tuple(plain)
        self._hooked = large(layout.sizes)
        self._matrices = [
            i
            for i, (parameter, block) in enumerate(zip(layout.parameters, layout.blocks, strict=True))
            if block != OUTSIDE and can_be_row_sparse(parameter)
        ]
        self._device = layout.device
        self._scratch: dict[torch.device, Tensor] = {}
        self._plans: dict[tuple[object, ...], GramianPlan] = {}
        self._sums: dict[tuple[object, ...], CombinePlan] = {}
        self._most_plans = 4 * len(layout.parameters) + _MORE_PLANS
        self._unseen = torch.tensor(
            [[i != j and anchor not in (i, j) for j in range(num_groups)] for i in range(num_groups)],
            device=self._device,
        )
        self._begin()

    def _begin(self) -> None:
        self._fresh = True
        T, K = len(self.layout.parameters), self.num_groups
        self._lead: Row = [None] * T  # the anchor's; outside the scope, the weighted sum so far
        self._alone: dict[int, dict[int, Tensor]] = {}  # gradients of parameters that the anchor does not reach
        self._reach = [[False] * T for _ in range(K)]
        self._touched: dict[int, RowSparse] = {}  # what the anchor's row-sparse gradients hold
        self._counted: set[int] = set()  # parameters whose part of G_aa is in the Gramian
        self._owner = Owner(self.layout)
        self._G = torch.zeros(
            self.layout.num_blocks + 1, K, K, dtype=accumulation_dtype(self._device), device=self._device
        )

    def _collect(self, losses: Sequence[Loss]) -> None:
        self._fresh = False
        order = [self._anchor, *(k for k in range(self.num_groups) if k != self._anchor)]
        for k in order:
            waiting = _Waiting(self, k)
            gradients = self._differentiate(
                losses[k],
                retain_graph=k != order[-1],
                take=waiting.take,
                hooked=() if k == self._anchor else self._hooked,
            )
            self._reach[k] = self._reached(losses[k][0], gradients)
            if k == self._anchor:
                self._keep(gradients)
            else:
                waiting.take_rest(gradients)

    def _reached(self, name: str, gradients: Row) -> list[bool]:
        """Return which parameters the group of this name reaches, which has these gradients."""
        return [gradient is not None for gradient in gradients]

    @torch.no_grad()
    def _keep(self, gradients: Row) -> None:
        """Keep the anchor's gradients."""
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self._owner.own(gradients, reached)
        self._lead = gradients
        for i in self._matrices:
            if gradients[i] is not None and (index := touched_rows(gradients[i])) is not None:
                self._touched[i] = RowSparse(index, gradients[i].index_select(0, index))
        outside = [i for i in reached if self.layout.blocks[i] == OUTSIDE]
        if outside:
            self._count(outside)
            torch._foreach_mul_([gradients[i] for i in outside], self._plain[self._anchor])

    @torch.no_grad()
    def reduce(self, k: int, members: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Take what is needed of auxiliary k's gradients of some parameters."""
        kinds: dict[tuple[int, bool, bool, torch.device], list[int]] = {}
        for n, i in enumerate(members):
            block, lead, device = self.layout.blocks[i], self._lead[i], self.layout.parameters[i].device
            if block == OUTSIDE:
                kinds.setdefault((block, False, False, device), []).append(n)
                self._add_outside(k, i, gradients[n])
            elif lead is None and self._shared_only:
                self._alone.setdefault(i, {})[k] = gradients[n]
            elif i in self._touched and (index := touched_rows(gradients[n])) is not None:
                mine = RowSparse(index, gradients[n].index_select(0, index))
                self._enter(k, block, [i], self._row_sparse_gramian([mine, self._touched[i]]))
            else:
                first = lead is not None and i not in self._counted
                kinds.setdefault((block, lead is not None, first, device), []).append(n)
        for (block, beside_lead, _, device), numbers in kinds.items():
            chosen = [members[n] for n in numbers]
            rows = [self._parts(chosen, [gradients[n] for n in numbers])]
            if beside_lead:
                rows.append(self._parts(chosen, [self._lead[i] for i in chosen]))
            self._enter(k, block, chosen, self._gramian(chosen, rows, device).to(self._device))

    def _enter(self, k: int, block: int, members: Sequence[int], M: Tensor) -> None:
        """Add to a block's G what auxiliary k's gradients of some parameters give, alone or beside the anchor's."""
        a, G = self._anchor, self._G[block]
        G[k, k] += M[0, 0]
        if len(M) > 1:
            G[k, a] += M[0, 1]
            G[a, k] += M[0, 1]
            if members[0] not in self._counted:
                G[a, a] += M[1, 1]
                self._counted.update(members)

    def _row_sparse_gramian(self, rows: Sequence[RowSparse]) -> Tensor:
        """Return the Gramian of two row-sparse gradients of one parameter."""
        index = union([row.index for row in rows])
        parts = [[row.on(index).view(-1)] for row in rows]
        return GramianPlan([parts[0][0].shape], len(parts), self._scratch_on(index.device))(parts)

    def _add_outside(self, k: int, i: int, gradient: Tensor) -> None:
        if self._lead[i] is None:
            self._lead[i] = self.layout.laid_out(i, gradient) * self._plain[k]
        else:
            self._lead[i].add_(gradient, alpha=self._plain[k])

    def _count(self, members: Sequence[int], block: int | None = None) -> None:
        """Add these parameters' part of G_aa, to their own blocks unless one is given."""
        kinds: dict[tuple[int, torch.device], list[int]] = {}
        for i in members:
            of = self.layout.blocks[i] if block is None else block
            kinds.setdefault((of, self.layout.parameters[i].device), []).append(i)
        for (of, device), chosen in kinds.items():
            parts = self._parts(chosen, [self._lead[i] for i in chosen])
            self._G[of, self._anchor, self._anchor] += self._gramian(chosen, [parts], device)[0, 0].to(self._device)
        self._counted.update(members)

    def _gramian(self, members: Sequence[int], rows: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
        """Return the Gramian of one row or two of these parameters' gradients."""
        key = (tuple(members), len(rows))
        if key not in self._plans:
            if len(self._plans) >= self._most_plans:  # what is reached keeps changing, as where layers are dropped
                self._plans.clear()
            self._plans[key] = GramianPlan([part.shape for part in rows[0]], len(rows), self._scratch_on(device))
        return self._plans[key](rows)

    def _scratch_on(self, device: torch.device) -> Tensor:
        if device not in self._scratch:
            self._scratch[device] = make_scratch(device, 2)
        return self._scratch[device]

    def _parts(self, members: Sequence[int], gradients: Sequence[Tensor]) -> list[Tensor]:
        return [
            gradient if self.layout.sizes[i] <= MOST_WHOLE else self.layout.flat(i, self.layout.laid_out(i, gradient))
            for i, gradient in zip(members, gradients, strict=True)
        ]

    def counts(self) -> list[int]:
        """Return for each parameter how many groups reach it."""
        return [sum(groups) for groups in zip(*self._reach, strict=True)]

    @torch.no_grad()
    def _gramians(self) -> tuple[Tensor, Tensor]:
        """Return the Gramians of the blocks, (B, K, K), and that of the parameters outside the scope, (K, K)."""
        counts = self.counts()
        rest = [i for i, lead in enumerate(self._lead) if lead is not None and i not in self._counted]
        rest = [i for i in rest if self.layout.blocks[i] != OUTSIDE]
        alone = [i for i in rest if self._shared_only and counts[i] == 1]
        self._count([i for i in rest if i not in alone])
        self._count(alone, OUTSIDE)
        for i, groups in self._alone.items():
            block = OUTSIDE if counts[i] == 1 else self.layout.blocks[i]
            for k, gradient in groups.items():
                part = self._gramian([i], [self._parts([i], [gradient])], gradient.device)
                self._G[block, k, k] += part[0, 0].to(self._device)
        return self._G[:-1], self._G[OUTSIDE]

    def seen(self, gramians: Tensor) -> Tensor:
        """Return the Gramians with NaN for the products of two auxiliaries, which nothing has computed."""
        return gramians.masked_fill(self._unseen, torch.nan)

    @torch.no_grad()
    def write(self, weights: Tensor, support: Sequence[int], plain: Sequence[float]) -> None:
        """Add the anchor's gradient times its weight to ``p.grad`` of every parameter that a group reaches.

        Args:
            weights: (B, K), each block's weights, zero but for the anchor's.
            support: The anchor's index.
            plain: K numbers, the weights outside the scope.
        """
        a = self._anchor
        aligned: Row = list(self._lead)
        kinds: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
        for i, (count, block) in enumerate(zip(self.counts(), self._blocks(), strict=True)):
            parameter = self.layout.parameters[i]
            if i in self._alone:
                aligned[i] = self._of_auxiliaries(i, plain)
            elif self.layout.blocks[i] == OUTSIDE:
                continue  # summed already
            elif aligned[i] is not None:
                kinds.setdefault((block, parameter.dtype, parameter.device), []).append(i)
            elif count:
                aligned[i] = torch.zeros_like(parameter, requires_grad=False)
        outside = weights.new_full((), plain[a])
        for (block, _, _), members in kinds.items():
            self._scale(members, outside if block == OUTSIDE else weights[block, a])
        self._deposit(aligned)
        self.discard()

    def _scale(self, members: Sequence[int], weight: Tensor) -> None:
        """Multiply the anchor's gradients of some parameters, of one dtype and device; of row-sparse ones the rows."""
        if dense := [i for i in members if i not in self._touched]:
            parts = self._parts(dense, [self._lead[i] for i in dense])
            key = tuple(dense)
            if key not in self._sums:
                self._sums = {} if len(self._sums) >= self._most_plans else self._sums
                self._sums[key] = CombinePlan([part.shape for part in parts], parts[0].device)
            self._sums[key](parts, [parts], [weight])
        for i in members:
            if touched := self._touched.get(i):
                values = [touched.values.view(-1)]
                CombinePlan([values[0].shape], values[0].device)(values, [values], [weight])
                self._lead[i].index_copy_(0, touched.index, touched.values)

    def _of_auxiliaries(self, i: int, plain: Sequence[float]) -> Tensor:
        """Return the aligned gradient of a parameter that auxiliaries alone reach, where only shared ones count."""
        (k, gradient), *others = self._alone[i].items()
        return self.layout.laid_out(i, gradient * (0.0 if others else plain[k]))

    def discard(self) -> None:
        """Drop the gradients."""
        super().discard()
        if not self._fresh:
            self._begin()


class _Waiting:
    """Gradients of one auxiliary that wait to be reduced together."""

    def __init__(self, collector: StreamedCollector, k: int) -> None:
        self._collector = collector
        self._k = k
        self._members: list[int] = []
        self._gradients: list[Tensor] = []
        self._taken: set[int] = set()
        self._numel = 0
        self._lock = Lock()

    def take(self, i: int, gradient: Tensor) -> bool:
        """Take a gradient, fresh from backward, which may come from a thread for each device."""
        with self._lock:
            self._taken.add(i)
            self._members.append(i)
            self._gradients.append(gradient)
            self._numel += gradient.numel()
            if self._numel >= (_CPU_WAIT if gradient.device.type == "cpu" else _ACCELERATOR_WAIT):
                self._reduce()
        return True

    def take_rest(self, gradients: Row) -> None:
        """Take the gradients that no hook has taken, and reduce all that wait."""
        for i, gradient in enumerate(gradients):
            if gradient is not None and i not in self._taken:
                self._members.append(i)
                self._gradients.append(gradient)
        self._reduce()

    def _reduce(self) -> None:
        if self._members:
            self._collector.reduce(self._k, self._members, self._gradients)
        self._members, self._gradients, self._numel = [], [], 0
