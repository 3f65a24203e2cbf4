"""Which collector sees the gradients of a step, and what it differentiates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor

from gradalign.arguments import check_anchor, check_mesh, check_parameters, check_sharded, rescales_anchor
from gradalign.collectors.agreement import telling
from gradalign.collectors.base import Collector, Loss, check_all_targets
from gradalign.collectors.batched import BatchedCollector
from gradalign.collectors.graphs import check_graphs
from gradalign.collectors.losses import Terms
from gradalign.collectors.parameters import Layout
from gradalign.collectors.pool import CollectorPool
from gradalign.collectors.probed import Probe, ProbedCollector
from gradalign.collectors.ranked import RankedStackedCollector, RankedStreamedCollector
from gradalign.collectors.sharded import ShardedCollector
from gradalign.collectors.stacked import StackedCollector
from gradalign.collectors.streamed import StreamedCollector
from gradalign.distributed import Ranks
from gradalign.kept import KeptWeights, Weighted
from gradalign.rules import BaseRule, RowRule, Rule
from gradalign.sharding import is_sharded


@dataclass(frozen=True)
class Conditions:
    """Under what the losses are differentiated, beside what they are.

    Attributes:
        known: The names of the last alignment's groups.
        scale: What a GradScaler multiplies the losses by; None for nothing.
        ranks: The ranks to average over; None for this one alone.
        last: No micro-batch follows.
        nonfinite: What happens to a step that is not finite.
    """

    known: tuple[str, ...] | None
    scale: Tensor | None
    ranks: Ranks | None
    last: bool
    nonfinite: str


@dataclass(frozen=True)
class Step:
    """One backward: its collector and what that differentiates.

    Attributes:
        collector: The collector.
        names: The groups' names; of a probed step the anchor's alone, for the others are known once it is evaluated.
        losses: What is differentiated.
        conditions: Under which it is taken.
        manner: How it is collected, in words, which have to be the same on all ranks.
        weighted: The weights, where those of an earlier step are kept.
    """

    collector: Collector
    names: tuple[str, ...]
    losses: list[Loss]
    conditions: Conditions
    manner: str
    weighted: Weighted | None = None

    def collect(self) -> None:
        """Differentiate the losses."""
        self.collector.collect(self.losses, self.conditions.scale, last=self.conditions.last)


AnyStacked = StackedCollector | RankedStackedCollector


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
        self._said = _said(rule)
        self._everything = scope == "all"
        self._global = granularity == "global"
        self._shared_only = scope == "shared"
        self._choice = collector
        self._kind = ""  # of the step at hand, with the names of its first micro-batch
        self._begun: tuple[str, ...] = ()
        self._scaled = False
        self._layout: Layout | None = None

    def layout(
        self, param_groups: Sequence[Mapping[str, Any]], chosen: Ranks | None, *, accumulating: bool
    ) -> tuple[Layout, Ranks | None]:
        """Return the layout of the parameters that require a gradient now, and the ranks to sum over.

        Args:
            param_groups: The optimizer's.
            chosen: The ranks to average over. DTensors are summed over the ranks of their mesh.
            accumulating: This is a micro-batch, of which replicated ranks tell one another nothing.
        """
        with telling(None if chosen is None or accumulating else partial(_give_up, chosen, param_groups)):
            layout = self.pool.layout(param_groups)
        if layout is not self._layout:
            if self._layout is not None:
                self.kept.forget()  # they are the weights of other parameters
            self._layout = layout
        if layout.shards is None:
            return layout, chosen
        check_mesh(layout.shards.size, 1 if chosen is None else chosen.size)
        return layout, layout.shards.ranks

    def begin(self, layout: Layout, groups: dict[str, Terms], probe: Probe | None, conditions: Conditions) -> Step:
        """Return the step that these losses make, or raise ValueError where they do not fit.

        Args:
            layout: The parameters.
            groups: The losses, checked.
            probe: The user's, checked.
            conditions: Under which they are differentiated.
        """
        names, ranks, scaled = tuple(groups), conditions.ranks, conditions.scale is not None
        if ranks is not None:
            check_all_targets(layout.parameters)  # later the others would have been sent something
        if layout.shards is not None:
            check_sharded(self._rule, self._choice, probe)
        else:  # sharded ones are differentiated by loss.backward(), which sees through it
            check_graphs(groups, batched=self._choice == "batched" and ranks is None)
        if self.pool.waiting:
            self._check_micro_batch(names, probe, scaled=scaled)
        else:
            self._kind = self._kind_of(names, probe, layout, keep_rows=layout.shards is not None or not conditions.last)
            self._begun, self._scaled = names, scaled
        manner = self._manner(conditions)
        if self._kind == "kept":
            return self._with_kept_weights(layout, groups, conditions, manner)
        if self._kind == "probed" and probe is not None:
            collector: Collector = self._probed(layout, groups, probe, ranks)
        else:
            self._check_groups(names, conditions.known)
            collector = self._exact(layout, names, ranks)
        return Step(collector, names, [(name, terms, None) for name, terms in groups.items()], conditions, manner)

    def finish(self, step: Step) -> tuple[str, ...]:
        """Return the names of all groups of the step, those of a probe too, which is evaluated.

        Args:
            step: The step, its last micro-batch collected.
        """
        if not isinstance(step.collector, ProbedCollector):
            return step.names
        names = (*step.names, *step.collector.evaluate(step.names[0]))
        self._check_groups(names, step.conditions.known)
        check_anchor(self._rule, names)
        return names

    def _probed(self, layout: Layout, groups: dict[str, Terms], probe: Probe, ranks: Ranks | None) -> ProbedCollector:
        collector = self.pool.get(("probed", ranks), lambda: ProbedCollector(layout, ranks))
        collector.add_probe(groups, probe)
        return collector

    def _exact(self, layout: Layout, names: tuple[str, ...], ranks: Ranks | None) -> Collector:
        if self._kind == "streamed":
            return self._streamed(layout, names, ranks)
        if self._kind == "batched" and ranks is None:
            return self.pool.get(("batched", len(names)), lambda: BatchedCollector(layout, len(names)))
        return self._stacked("stacked", layout, len(names), ranks)

    def _streamed(self, layout: Layout, names: tuple[str, ...], ranks: Ranks | None) -> StreamedCollector:
        (anchor,), plain, K = self._support(names), self._rule.plain_weights(names), len(names)

        def make() -> StreamedCollector:
            shared_only = self._shared_only
            if ranks is None:
                return StreamedCollector(layout, K, anchor=anchor, plain=plain, shared_only=shared_only)
            return RankedStreamedCollector(layout, K, ranks, anchor=anchor, plain=plain, shared_only=shared_only)

        return self.pool.get(("streamed", K, anchor, plain, ranks), make)

    def _stacked(self, key: str, layout: Layout, K: int, ranks: Ranks | None) -> AnyStacked:
        def make() -> AnyStacked:
            if layout.shards is not None:
                return ShardedCollector(layout, K, layout.shards, shared_only=self._shared_only)
            if ranks is None:
                return StackedCollector(layout, K, shared_only=self._shared_only)
            return RankedStackedCollector(layout, K, ranks, shared_only=self._shared_only)

        return self.pool.get((key, K, ranks), make)

    def _with_kept_weights(self, layout: Layout, groups: dict[str, Terms], conditions: Conditions, manner: str) -> Step:
        names = self.kept.names
        weighted = self.kept.apply(
            groups,
            self._support(names),
            self._rule.plain_weights(names),
            one_vector=self._everything and self._global,
            everything=self._everything,
        )
        collector = self._stacked("kept", layout, len(weighted.losses), conditions.ranks)
        return Step(collector, names, weighted.losses, conditions, manner, weighted)

    def _check_micro_batch(self, names: tuple[str, ...], probe: Probe | None, *, scaled: bool) -> None:
        """Raise ValueError unless this micro-batch is like the first of its step."""
        if probe is not None and self._kind not in ("probed", "kept"):
            raise ValueError(
                "`probe` must be given for every micro-batch or for none, got one after micro-batches without; pass all"
                " losses, or call zero_grad() and start the accumulation again."
            )
        if probe is None and self._kind == "probed":
            raise ValueError(
                "`probe` must be given for every micro-batch or for none, got None after micro-batches with one; pass"
                " it, or call zero_grad() and start the accumulation again."
            )
        if scaled != self._scaled:
            raise ValueError(
                "`scaler` must be given for every micro-batch or for none, got"
                f" {'one after micro-batches without' if scaled else 'None after micro-batches with one'}; pass it each"
                " time, or call zero_grad() and start the accumulation again."
            )
        if names != self._begun:
            raise _other_groups(self._begun, names, "while micro-batches wait")

    def _check_groups(self, names: tuple[str, ...], known: tuple[str, ...] | None) -> None:
        """Raise ValueError unless the rule and its memory fit these groups."""
        self._rule.check_groups(len(names), names)
        if self._rule.stateful and known is not None and names != known:
            raise _other_groups(known, names, f"under {self._rule!r}, which remembers them")

    def _kind_of(self, names: tuple[str, ...], probe: Probe | None, layout: Layout, *, keep_rows: bool) -> str:
        if self.kept.serve(names, layout, anchor_alone=probe is not None):
            return "kept"
        if probe is not None:
            return "probed"
        if rescales_anchor(self._rule) and self._choice in ("auto", "streamed") and not keep_rows:
            return "streamed"
        return "batched" if self._choice == "batched" else "stacked"

    def _manner(self, conditions: Conditions) -> str:
        """Return how this step goes on, in words, which have to be the same on all ranks."""
        waiting = self.pool.current.pending if self.pool.waiting and self.pool.current is not None else 0
        words = [f"{self._said}, {self._kind}"]
        if self._shared_only:
            words.append("scope='shared'")
        if waiting:
            words.append(f"micro-batch {waiting + 1}")
        elif self.pool.waiting:
            words.append("after a lost micro-batch")
        if conditions.nonfinite != "raise":
            words.append(f"nonfinite={conditions.nonfinite!r}")
        return ", ".join([*words, "scaled"] if conditions.scale is not None else words)

    def _support(self, names: Sequence[str]) -> tuple[int, ...]:
        return self._rule.support(names) if isinstance(self._rule, Rule) else tuple(range(len(names)))


def _give_up(ranks: Ranks, param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Tell the others that there is no layout here; those of sharded parameters wait in their mesh's own group."""
    parameters = [p for group in param_groups for p in group["params"]]
    if not any(map(is_sharded, parameters)):
        ranks.give_up(parameters[0].device)


def _said(rule: object) -> str:
    """Return a rule in words that are the same on all ranks: its class and those of its settings that are plain."""
    settings = [(f.name, getattr(rule, f.name)) for f in fields(rule)] if is_dataclass(rule) else []
    settings = [(name, value.tolist() if isinstance(value, Tensor) else value) for name, value in settings]
    told = [f"{name}={_said(value)}" for name, value in settings if isinstance(value, BaseRule)]
    told += [f"{name}={value!r}" for name, value in settings if _plain(value)]
    return f"{type(rule).__name__}({', '.join(told)})"


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, Mapping):
        return _plain(tuple(value.items()))
    return value is None or isinstance(value, bool | int | float | str)


def _other_groups(known: tuple[str, ...], names: tuple[str, ...], why: str) -> ValueError:
    return ValueError(
        f"`losses` must keep the loss groups {list(known)} {why}, got {list(names)};"
        " pass the same names in the same order, or make a new aligner."
    )
