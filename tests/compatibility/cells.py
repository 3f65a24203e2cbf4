"""The cells of the first table in docs/compatibility.md: what a row of it checks under each collector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from gradalign import GradientAligner
from gradalign.rules import GASoft
from tests.compatibility import nets, oracle

COLLECTORS = {
    "stacked": ("sum", "pcgrad"),
    "batched": ("sum", "pcgrad"),
    "streamed": ("ga-soft",),
    "probed": ("ga-soft",),
}
"""Each collector with the rules that it is held to: streamed and probed serve rules that rescale their anchor."""

YES, REFUSED, IN_PART = "yes", "refused", "in part"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        make: Makes the network, the same at every call.
        refused: For each collector that refuses it, the error and what its message has to match.
        in_part: Collectors whose result is another one, which the note in the page explains.
        tolerances: For assert_close under a collector, or else under a rule, where float32's default is too strict.
        scale: A GradScaler's, None without one.
        prepare: Called with each network that is made, before its forward.
        around: The context in which everything happens.
        check: What is checked in place of one step against the oracle, given the row and the collector.
        conflicting: The losses conflict, so that PCGrad has something to do.
    """

    make: Callable[[], nn.Module]
    refused: Mapping[str, tuple[type[Exception], str]] = field(default_factory=dict)
    in_part: tuple[str, ...] = ()
    tolerances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    scale: float | None = None
    prepare: Callable[[nn.Module], object] = lambda net: None
    around: Callable[[], AbstractContextManager] = nullcontext
    check: Callable[[Row, str], None] | None = None
    conflicting: bool = True

    def word(self, collector):
        if collector in self.refused:
            return REFUSED
        return IN_PART if collector in self.in_part else YES

    def network(self):
        net = nets.seeded(self.make)
        self.prepare(net)
        return net


def rule_of(name):
    return GASoft(oracle.ALPHA) if name == "ga-soft" else name


def wrapped(net, collector, rule, **options):
    return GradientAligner(torch.optim.SGD(net.parameters(), lr=0.1), rule_of(rule), collector=collector, **options)


def backward(optimizer, losses_of, collector, **options):
    """Call backward as the collector wants it; ``losses_of`` evaluates all losses, the main one first."""
    losses = losses_of()
    if collector != "probed":
        optimizer.backward(losses, **options)
        return
    main = next(iter(losses))
    optimizer.backward({main: losses[main]}, probe=lambda: without(losses_of(), main), **options)


def without(losses, main):
    return {name: loss for name, loss in losses.items() if name != main}


def evaluated(losses_of, collector):
    """Evaluate the losses as ``backward`` above does: the probe's in a forward of their own, which follows."""
    losses = losses_of()
    if collector != "probed":
        return losses
    main = next(iter(losses))
    return {main: losses[main], **without(losses_of(), main)}


def step_equals_the_oracle(row, collector):
    """Check that one backward leaves in ``p.grad`` what the rule makes by hand, for each rule of the collector."""
    for rule in COLLECTORS[collector]:
        net = row.network()
        optimizer = wrapped(net, collector, rule)
        scaler = None if row.scale is None else torch.amp.GradScaler("cpu", init_scale=row.scale)
        torch.manual_seed(5)
        try:
            backward(optimizer, net.losses, collector, scaler=scaler)
        except Exception:
            assert all(p.grad is None for p in net.parameters())  # an error leaves no half of a step
            raise
        if scaler is not None:
            scaler.unscale_(optimizer)
        assert optimizer.report.collector == collector
        probed = collector == "probed"
        expected = expected_gradient(row, collector, rule)
        tolerance = row.tolerances.get(collector, row.tolerances.get(rule, {}))
        oracle.assert_same(oracle.taken(net.parameters()), expected, zeros_may_lack=probed, **tolerance)


def expected_gradient(row, collector, rule):
    reference = nets.seeded(row.make)  # as it is: by plain torch
    parameters = [p for p in reference.parameters() if p.requires_grad]
    torch.manual_seed(5)
    losses = evaluated(reference.losses, collector)
    if rule == "sum" and row.scale is None:
        made = oracle.plain(losses, parameters)
    else:
        rows = oracle.raw(losses, parameters, row.scale or 1.0)
        assert not row.conflicting or oracle.gramian(rows)[0, 1] < 0
        made = oracle.combined(rule, rows)
    gradients = iter(made)
    return [next(gradients) if p.requires_grad else None for p in reference.parameters()]
