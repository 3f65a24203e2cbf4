"""The stacked and the streamed collector on many ranks, each with its own part of the batch.

Shapes: K groups, T parameters, N ranks; P elements in a gradient; a is the anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.collectors.agreement import agreed, telling
from gradalign.collectors.base import Collector, Loss
from gradalign.collectors.parameters import OUTSIDE, Layout
from gradalign.collectors.stacked import StackedCollector
from gradalign.collectors.streamed import StreamedCollector
from gradalign.distributed import Arriving, Ranks, Row


class RankedStackedCollector(Collector):
    """Average K gradients over the ranks, as shares, and give every rank the whole of their weighted sum.

    A group's gradient is on its way to the others' shares while the next group's backward runs. The Gramian is the
    sum of the shares' Gramians; the weighted sum is formed share by share, and then sent to all. K reduce-scatters and
    one all-gather are (K + 1) P on the wire, where an all-reduce of each gradient would be 2 K P.

    Args:
        layout: The parameters and their blocks.
        num_groups: K.
        ranks: The ranks.
        shared_only: Parameters that a single group reaches count as outside the scope.
    """

    name: ClassVar[str] = "stacked"

    def __init__(self, layout: Layout, num_groups: int, ranks: Ranks, *, shared_only: bool = False) -> None:
        super().__init__(layout, num_groups, shared_only=shared_only)
        self._ranks = ranks
        self._here = [StackedCollector(layout, 1, must_reach=False) for _ in range(num_groups)]
        self._shares = StackedCollector(_shares(layout, ranks), num_groups, shared_only=shared_only)
        self._arriving: list[Callable[[], Row]] = []

    def _collect(self, losses: Sequence[Loss]) -> None:
        tell = partial(self._ranks.agree, self.layout, None) if self.last else None
        for k, (here, loss) in enumerate(zip(self._here, losses, strict=True)):
            with telling(tell):
                here.add(0, loss, retain_graph=k + 1 < len(losses))
            if self.last:
                self._send(here, loss[0])

    @torch.no_grad()
    def _send(self, here: StackedCollector, name: str) -> None:
        row = here.row(0)
        reached = agreed(self._ranks, self.layout, name, row)
        self._arriving.append(self._ranks.split(self.layout, row, reached))
        here.discard()

    def _arrived(self) -> StackedCollector:
        """Return the collector of the shares, with their rows."""
        if self._arriving:
            self._shares.adopt([wait() for wait in self._arriving])
            self._arriving = []
        return self._shares

    def check_targets(self) -> None:
        """Do nothing: all were checked before the ranks had sent anything."""

    def counts(self) -> list[int]:
        """Return for each parameter how many groups reach it, on any rank."""
        return self._arrived().counts()

    @torch.no_grad()
    def _gramians(self) -> tuple[Tensor, Tensor]:
        blocks, outside = self._arrived().gramians()
        G = self._ranks.total(torch.cat([blocks, outside.unsqueeze(0)]))
        return G[:-1], G[-1]

    @torch.no_grad()
    def write(self, weights: Tensor, support: Sequence[int], plain: Sequence[float]) -> None:
        """Add the weighted sum of the average gradients to ``p.grad`` of every parameter that a group reaches.

        Args:
            weights: (B, K), each block's weights.
            support: The groups whose weight can differ from zero.
            plain: K numbers, the weights outside the scope.
        """
        combined = self._arrived().combined(weights, support, plain)
        self._deposit(self._ranks.join(self.layout, combined))
        self.discard()

    @torch.no_grad()
    def write_rows(self, align: Callable[[int, list[Tensor]], Tensor], plain: Sequence[float]) -> None:
        """Add to ``p.grad`` what a function of the whole rows makes of them, as ``StackedCollector`` does."""
        shares = self._arrived()
        whole = StackedCollector(self.layout, self.num_groups, shared_only=self._shared_only)
        whole.adopt([self._ranks.join(self.layout, shares.row(k)) for k in range(self.num_groups)])
        whole.scale = self.scale
        whole.write_rows(align, plain)
        self.discard()

    def discard(self) -> None:
        """Drop the gradients."""
        super().discard()
        self._arriving = []
        self._shares.discard()
        for here in self._here:
            here.discard()


class RankedStreamedCollector(StreamedCollector):
    """Average the anchor's gradient alone, on its way while the first auxiliary's backward runs.

    Of an auxiliary each rank sees the product of its own gradient with that average; the mean of these is the product
    of the two averages. So no more goes over the wire than in joint training, and the norm of an auxiliary's average
    gradient stays unseen.

    Args:
        layout: The parameters and their blocks.
        num_groups: K.
        ranks: The ranks.
        anchor: The anchor's index, the only group whose weight is not zero.
        plain: K numbers, the weights outside the scope.
        shared_only: Parameters that a single group reaches count as outside the scope.
    """

    def __init__(
        self,
        layout: Layout,
        num_groups: int,
        ranks: Ranks,
        *,
        anchor: int,
        plain: Sequence[float],
        shared_only: bool = False,
    ) -> None:
        self._ranks = ranks
        super().__init__(layout, num_groups, anchor=anchor, plain=plain, shared_only=shared_only)
        self._must_reach = False  # another rank may
        self._matrices = []  # the average touches other rows than this rank's gradient
        auxiliaries = torch.arange(num_groups, device=self._device) != anchor
        self._unseen = auxiliaries.unsqueeze(0) & auxiliaries.unsqueeze(1)

    def _begin(self) -> None:
        super()._begin()
        self._arriving = Arriving()
        self._squares: Tensor | None = None

    def check_targets(self) -> None:
        """Do nothing: all were checked before the ranks had sent anything."""

    def _differentiate(
        self, loss: Loss, *, retain_graph: bool, take: Callable[[int, Tensor], bool], hooked: Iterable[int]
    ) -> Row:
        with telling(partial(self._ranks.agree, self.layout, None)):
            return super()._differentiate(loss, retain_graph=retain_graph, take=take, hooked=hooked)

    def _reached(self, name: str, gradients: Row) -> list[bool]:
        return agreed(self._ranks, self.layout, name, gradients)

    @torch.no_grad()
    def _keep(self, gradients: Row) -> None:
        super()._keep(gradients)
        reach = self._reach[self._anchor]
        inside = [i for i, block in enumerate(self.layout.blocks) if reach[i] and block != OUTSIDE]
        self._arriving = self._ranks.average(self.layout, gradients, inside)

    @torch.no_grad()
    def reduce(self, k: int, members: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Take what is needed of auxiliary k's gradients of some parameters."""
        self._arriving.wait(members)
        super().reduce(k, members, gradients)

    @torch.no_grad()
    def _gramians(self) -> tuple[Tensor, Tensor]:
        self._arriving.wait()
        super()._gramians()
        self._G = self._ranks.mean(self._G)
        self._squares = self._G.diagonal(dim1=-2, dim2=-1).clone()
        blocks = self._G[:-1]
        # No mean of squares is the mean's square; but what is not finite stays, so that no rule hides an overflow.
        return blocks.masked_fill_(self._unseen & blocks.isfinite(), 0.0), self._G[OUTSIDE]

    def squares(self, gramians: Tensor, outside: Tensor) -> Tensor:
        """Return numbers that are finite where a group's gradient is on all ranks, (B + 1, K)."""
        assert self._squares is not None
        return self._squares

    @torch.no_grad()
    def write(self, weights: Tensor, support: Sequence[int], plain: Sequence[float]) -> None:
        """Add the anchor's average gradient times its weight to ``p.grad``, as ``StreamedCollector`` does."""
        self._average_the_rest()
        super().write(weights, support, plain)

    def _average_the_rest(self) -> None:
        """Average what is written beside: the sums outside the scope, and what one auxiliary alone reaches."""
        counts, row = self.counts(), list(self._lead)
        outside = [i for i, block in enumerate(self.layout.blocks) if block == OUTSIDE and counts[i]]
        alone: dict[int, int] = {}
        for i, count in enumerate(counts):
            if self._shared_only and count == 1 and not self._reach[self._anchor][i]:
                alone[i] = next(k for k, reach in enumerate(self._reach) if reach[i])
                mine = self._alone.get(i, {}).get(alone[i])
                # Autograd's own may be another parameter's too, or one that a hook keeps; it is averaged in place.
                row[i] = None if mine is None else torch.empty_like(self.layout.parameters[i]).copy_(mine)
        self._ranks.average(self.layout, row, sorted([*outside, *alone])).wait()
        for i in outside:
            self._lead[i] = row[i]
        self._alone = {i: {k: row[i]} for i, k in alone.items()}


def _shares(layout: Layout, ranks: Ranks) -> Layout:
    """Return the layout of one rank's shares."""
    pieces = [
        torch.empty((), dtype=p.dtype, device=p.device).expand(ranks.length(layout, i))
        for i, p in enumerate(layout.parameters)
    ]
    return Layout(pieces, layout.blocks, layout.num_blocks)
