"""Which collector sees the gradients of a step, and what it differentiates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradalign.arguments import check_parameters, rescales_anchor
from gradalign.collectors.base import Collector, Loss
from gradalign.collectors.losses import Terms
from gradalign.collectors.parameters import Layout
from gradalign.collectors.pool import CollectorPool
from gradalign.collectors.probed import Probe, ProbedCollector
from gradalign.collectors.stacked import StackedCollector
from gradalign.collectors.streamed import StreamedCollector
from gradalign.kept import KeptWeights, Weighted
from gradalign.rules import RowRule, Rule


@dataclass(frozen=True)
class Step:
    """One backward: its collector and what that differentiates.

    Attributes:
        collector: The collector.
        names: The groups' names; of a probed step the anchor's alone, for the others are known once it is evaluated.
        losses: What is differentiated.
        weighted: The weights, where those of an earlier step are kept.
    """

    collector: Collector
    names: tuple[str, ...]
    losses: list[Loss]
    weighted: Weighted | None = None


class Steps:
    """Choose how each step is collected; a step of several micro-batches goes on as it began.

    Args:
        rule: The rule.
        scope: Which parameters are aligned, checked.
        granularity: What shares one Gramian, checked.
        collector: The user's choice. "auto" and "streamed" keep nothing of an auxiliary, where the rule allows it, but
            under ``accumulate()`` the auxiliaries' sums are needed, so that they are kept there.
        update_every: Weights are computed every so many steps.
    """

    def __init__(
        self,
        rule: Rule | RowRule,
        scope: str | tuple[Tensor, ...],
        granularity: str | tuple[tuple[Tensor, ...], ...],
        collector: str,
        update_every: int,
    ) -> None:
        self.pool = CollectorPool(scope, granularity, check_parameters)
        self.kept = KeptWeights(update_every)
        self._rule = rule
        self._whole = scope == "all" and granularity == "global"
        self._shared_only = scope == "shared"
        self._choice = collector
        self._kind = ""
        self._layout: Layout | None = None

    def begin(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        groups: dict[str, Terms],
        probe: Probe | None,
        *,
        accumulating: bool,
    ) -> Step:
        """Return the step that these losses make.

        Args:
            param_groups: The optimizer's.
            groups: The losses, checked.
            probe: The user's, checked.
            accumulating: More micro-batches follow.
        """
        layout = self.pool.layout(param_groups)
        if layout is not self._layout:
            if self._layout is not None:
                self.kept.forget()  # they are the weights of other parameters
            self._layout = layout
        names = tuple(groups)
        if not self.pool.waiting:
            self._kind = self._kind_of(names, probe, layout.num_blocks, accumulating)
        elif probe is not None and self._kind not in ("probed", "kept"):
            raise ValueError(
                "`probe` must be given for every micro-batch or for none, got one after micro-batches without; pass all"
                " losses, or call zero_grad() and start the accumulation again."
            )
        losses: list[Loss] = [(name, terms, None) for name, terms in groups.items()]
        if self._kind == "kept":
            of = self.kept.names
            weighted = self.kept.apply(groups, self._support(of), self._rule.plain_weights(of), one_vector=self._whole)
            n = len(weighted.losses)
            kept = self.pool.get(("kept", n), lambda: StackedCollector(layout, n, shared_only=self._shared_only))
            return Step(kept, of, weighted.losses, weighted)
        if self._kind == "probed":
            return Step(self.pool.get(("probed",), lambda: ProbedCollector(layout)), names, losses)
        if self._kind == "streamed":
            (anchor,), plain = self._support(names), self._rule.plain_weights(names)
            return Step(
                self.pool.get(
                    ("streamed", len(names), anchor, plain),
                    lambda: StreamedCollector(
                        layout, len(names), anchor=anchor, plain=plain, shared_only=self._shared_only
                    ),
                ),
                names,
                losses,
            )
        stacked = self.pool.get(
            ("stacked", len(names)), lambda: StackedCollector(layout, len(names), shared_only=self._shared_only)
        )
        return Step(stacked, names, losses)

    def check_groups(self, names: tuple[str, ...], known: tuple[str, ...] | None) -> None:
        """Raise ValueError unless the rule, its memory and the micro-batches that wait fit these groups.

        Args:
            names: This step's.
            known: The last step's.
        """
        self._rule.check_groups(len(names), names)
        if known is None or names == known:
            return
        waiting = self.pool.current is not None and self.pool.current.pending
        if self._rule.stateful or waiting:
            why = "while micro-batches wait" if waiting else f"under {self._rule!r}, which remembers them"
            raise ValueError(
                f"`losses` must keep the loss groups {list(known)} {why}, got {list(names)};"
                " pass the same names in the same order, or make a new aligner."
            )

    def _kind_of(self, names: tuple[str, ...], probe: Probe | None, num_blocks: int, accumulating: bool) -> str:
        if self.kept.serve(names, num_blocks, anchor_alone=probe is not None):
            return "kept"
        if probe is not None:
            return "probed"
        if rescales_anchor(self._rule) and self._choice in ("auto", "streamed") and not accumulating:
            return "streamed"
        return "stacked"

    def _support(self, names: Sequence[str]) -> tuple[int, ...]:
        return self._rule.support(names) if isinstance(self._rule, Rule) else tuple(range(len(names)))
