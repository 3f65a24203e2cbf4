"""The stacked collector: every group's gradient is kept as a row, so that any weights can combine them.

Shapes: K groups, P elements of a bucket's row, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradalign.collectors.parameters import OUTSIDE, Layout
from gradalign.gramian import accumulation_dtype, gramian


class StackedCollector:
    """Keep K gradients as rows, give their Gramians, and write a weighted sum of them into ``p.grad``.

    The rows of groups 1 to K-1 are buffers of this collector, made once. The first group's row is made anew for
    each alignment, for the aligned gradient is formed in it and it becomes the memory of ``p.grad``: so a step holds
    K-1 gradients more than ``loss.backward()``, and one group's more while it is computed and copied. A gradient that
    the user kept from an earlier step never changes.

    Args:
        layout: The parameters, their blocks and places.
        num_groups: K.
        shared_only: Parameters that a single group reaches count as outside the scope.
    """

    def __init__(self, layout: Layout, num_groups: int, *, shared_only: bool) -> None:
        self.layout = layout
        self.num_groups = num_groups
        self.pending = 0
        """Micro-batches whose gradients wait in the rows."""
        self._shared_only = shared_only
        self.spoiled = False
        """An error lost the gradients of earlier micro-batches; ``discard`` forgets it."""
        self._reach = [[False] * len(layout.parameters) for _ in range(num_groups)]
        self._leads: list[Tensor] = []
        self._lead_views: list[list[Tensor]] = []
        self._kept = [
            [torch.zeros(bucket.numel, dtype=bucket.dtype, device=bucket.device) for _ in range(num_groups - 1)]
            for bucket in layout.buckets
        ]
        self._kept_views = [
            [layout.views(bucket, row) for row in rows] for bucket, rows in zip(layout.buckets, self._kept, strict=True)
        ]

    def collect(self, losses: Sequence[tuple[str, tuple[Tensor, ...]]]) -> None:
        """Add each group's gradient to its row.

        Args:
            losses: K pairs of a group's name and its scalar losses.

        Raises:
            ValueError: A group reaches no parameter, or its gradient is sparse.
            RuntimeError: The gradients of earlier micro-batches were spoiled by an error.
        """
        if self.spoiled:
            raise RuntimeError(
                "The gradients of earlier micro-batches were lost to an error inside accumulate();"
                " call zero_grad() and start the accumulation again."
            )
        if not self.pending:
            self._begin()
        try:
            for k, (name, terms) in enumerate(losses):
                self._store(k, self._differentiate(name, terms, retain_graph=k + 1 < len(losses)))
        except BaseException:
            waiting = self.pending
            self.discard()
            self.spoiled = waiting > 0
            raise
        self.pending += 1

    @torch.no_grad()
    def gramians(self) -> tuple[Tensor, Tensor]:
        """Return the Gramians of the blocks, (B, K, K), and that of the parameters outside the scope, (K, K)."""
        device = self.layout.buckets[0].device
        shape = (self.layout.num_blocks + 1, self.num_groups, self.num_groups)
        G = torch.zeros(shape, dtype=accumulation_dtype(device), device=device)
        blocks = self._blocks()
        for bucket, rows in zip(self.layout.buckets, self._rows(), strict=True):
            for start, end, block in self.layout.runs(bucket, blocks):
                G[block] += gramian([row[start:end] for row in rows]).to(device)
        return G[:-1], G[OUTSIDE]

    def check_targets(self) -> None:
        """Raise ValueError where ``p.grad`` holds something that a gradient cannot be added to in place."""
        for parameter, reached in zip(self.layout.parameters, self._reached(), strict=True):
            gradient = parameter.grad
            if gradient is None or not reached:
                continue
            dense = gradient.layout == torch.strided
            if not dense or any(
                step == 0 and size > 1 for step, size in zip(gradient.stride(), gradient.shape, strict=True)
            ):
                kind = "an expanded tensor" if dense else gradient.layout
                raise ValueError(
                    f"`p.grad` must be None or a dense tensor with memory of its own, got {kind} for a parameter of"
                    f" shape {tuple(parameter.shape)}; call zero_grad() before backward, or clone() it."
                )

    @torch.no_grad()
    def write(self, weights: Tensor, support: Sequence[int], plain: Sequence[float]) -> None:
        """Add the weighted sum of the rows to ``p.grad`` of every parameter that a group reaches.

        Args:
            weights: (B, K), each block's weights.
            support: The groups whose weight can differ from zero; the other rows are not read.
            plain: K numbers, the weights outside the scope.
        """
        blocks = self._blocks()
        outside = torch.stack([weights.new_full((), weight) for weight in plain])
        table = torch.cat([weights, outside.unsqueeze(0)])  # the last row is OUTSIDE's
        for bucket, rows in zip(self.layout.buckets, self._rows(), strict=True):
            for start, end, block in self.layout.runs(bucket, blocks):
                groups = range(self.num_groups) if block == OUTSIDE else support
                _combine([row[start:end] for row in rows], table[block], groups)
        self._deposit()
        self.discard()

    @torch.no_grad()
    def write_rows(self, align: Callable[[int, list[Tensor]], Tensor], plain: Sequence[float]) -> None:
        """Add to ``p.grad`` what a function of the rows themselves makes of them, block by block.

        Args:
            align: Maps a block's number and its K rows (P,) to the aligned gradient (P,). It must not change them.
            plain: K numbers, the weights outside the scope.
        """
        blocks = self._blocks()
        parts: dict[int, list[list[Tensor]]] = {}  # for each block its runs, each with K pieces of rows
        for bucket, rows in zip(self.layout.buckets, self._rows(), strict=True):
            for start, end, block in self.layout.runs(bucket, blocks):
                parts.setdefault(block, []).append([row[start:end] for row in rows])
        for block, runs in parts.items():
            if block == OUTSIDE:
                for rows in runs:
                    _combine(rows, torch.stack([rows[0].new_full((), weight) for weight in plain]), range(len(rows)))
                continue
            aligned = align(block, [_joined(pieces) for pieces in zip(*runs, strict=True)])
            start = 0
            for lead, *_ in runs:
                lead.copy_(aligned[start : start + lead.numel()])
                start += lead.numel()
        self._deposit()
        self.discard()

    def check_nothing_waits(self) -> None:
        """Raise RuntimeError where micro-batches wait, or have been lost: it is too early for a step."""
        if self.spoiled:
            raise RuntimeError(
                "step() must follow a backward, but an error inside accumulate() lost the gradients of the"
                " micro-batches; call zero_grad() and start the accumulation again."
            )
        if self.pending:
            raise RuntimeError(
                f"step() must follow a backward outside accumulate(), got {self.pending} micro-batches waiting;"
                " call backward of the last micro-batch outside accumulate(), or zero_grad() to drop them."
            )

    def discard(self) -> None:
        """Drop the gradients in the rows."""
        self.pending = 0
        self.spoiled = False
        self._leads, self._lead_views = [], []

    def _begin(self) -> None:
        self._leads = [torch.empty(b.numel, dtype=b.dtype, device=b.device) for b in self.layout.buckets]
        self._lead_views = [self.layout.views(b, row) for b, row in zip(self.layout.buckets, self._leads, strict=True)]

    def _differentiate(self, name: str, terms: tuple[Tensor, ...], retain_graph: bool) -> tuple[Tensor | None, ...]:
        # autograd.grad, not backward: it leaves p.grad alone, and never starts the reducer of DDP.
        gradients = torch.autograd.grad(terms, self.layout.parameters, retain_graph=retain_graph, allow_unused=True)
        for gradient, parameter in zip(gradients, self.layout.parameters, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise ValueError(
                    f"`losses[{name!r}]` must have dense gradients, got a {gradient.layout} one for a parameter of"
                    f" shape {tuple(parameter.shape)}; make its embedding with sparse=False."
                )
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                f"`losses[{name!r}]` must reach a parameter of the optimizer that requires a gradient, got a loss"
                " that reaches none; check that it is computed from this model, or leave the group out."
            )
        return gradients

    @torch.no_grad()
    def _store(self, k: int, gradients: tuple[Tensor | None, ...]) -> None:
        """Put the gradients of group k into its row, or add them to the micro-batches that wait there."""
        stale = self._reach[k]  # parts of the row that are not known to be zero
        reach = [gradient is not None for gradient in gradients]
        self._reach[k] = [old or new for old, new in zip(stale, reach, strict=True)]
        put = torch._foreach_add_ if self.pending else torch._foreach_copy_
        for b, bucket in enumerate(self.layout.buckets):
            into: list[Tensor] = []
            new: list[Tensor] = []
            zero: list[Tensor] = []
            views = self._lead_views[b] if k == 0 else self._kept_views[b][k - 1]
            for i, view in zip(bucket.members, views, strict=True):
                gradient = gradients[i]
                if gradient is not None:
                    into.append(view)
                    new.append(gradient)
                elif not self.pending and (k == 0 or stale[i]):
                    zero.append(view)
            if into:
                put(into, new)
            if zero:
                torch._foreach_zero_(zero)
        if not self.pending:
            self._reach[k] = reach

    def _reached(self) -> list[bool]:
        """Return for each parameter whether a group reaches it."""
        return [any(groups) for groups in zip(*self._reach, strict=True)]

    def _rows(self) -> list[list[Tensor]]:
        return [[lead, *kept] for lead, kept in zip(self._leads, self._kept, strict=True)]

    def _blocks(self) -> Sequence[int]:
        if not self._shared_only:
            return self.layout.blocks
        counts = [sum(groups) for groups in zip(*self._reach, strict=True)]
        return [block if count > 1 else OUTSIDE for block, count in zip(self.layout.blocks, counts, strict=True)]

    def _deposit(self) -> None:
        """Add the first rows to ``p.grad``; where there is none, their parts become it."""
        reached = self._reached()
        parts = [
            (self.layout.parameters[i], view)
            for bucket, views in zip(self.layout.buckets, self._lead_views, strict=True)
            for i, view in zip(bucket.members, views, strict=True)
            if reached[i]
        ]
        if present := [(p.grad, view) for p, view in parts if p.grad is not None]:
            torch._foreach_add_([gradient for gradient, _ in present], [view for _, view in present])
        for parameter, view in parts:
            if parameter.grad is None:
                parameter.grad = view.detach()
        for parameter, _ in parts:
            # What register_post_accumulate_grad_hook holds: autograd.grad does not run them, loss.backward() would.
            for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(parameter)


def _combine(rows: Sequence[Tensor], weights: Tensor, support: Sequence[int]) -> None:
    """Form the weighted sum of the rows of ``support`` in place of the first row; half precision sums in float32."""
    lead = rows[0]
    dtype = torch.promote_types(lead.dtype, torch.float32)
    total = lead if dtype == lead.dtype else torch.empty_like(lead, dtype=dtype)
    w = weights.to(lead.device, dtype).unbind()  # 0-dimensional: read on their device, never on the host
    first, *others = sorted(support)  # the first row is overwritten: it has to be read first
    torch.mul(rows[first].to(dtype), w[first], out=total)
    for k in others:
        total.addcmul_(rows[k].to(dtype), w[k])
    if total is not lead:
        lead.copy_(total)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Return the pieces of one row as one tensor, in the widest of their dtypes, on the first one's device."""
    if len(pieces) == 1:
        return pieces[0]
    dtype = pieces[0].dtype
    for piece in pieces:
        dtype = torch.promote_types(dtype, piece.dtype)
    return torch.cat([piece.to(pieces[0].device, dtype) for piece in pieces])
