"""The rows of the second table in docs/compatibility.md: inner optimizers, and what a loop does around backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from gradalign import GradientAligner
from tests.compatibility import nets, oracle
from tests.compatibility.cells import REFUSED, YES, rule_of

RULES = {"sum": "stacked", "pcgrad": "stacked", "ga-soft": "streamed"}
"""Each rule of the table with the collector that serves it."""

STEPS = 4


@dataclass(frozen=True)
class Loop:
    """One line of the table.

    Attributes:
        inner: Makes the inner optimizer from parameters or parameter groups.
        make: Makes the network, the same at every call.
        groups: What ``inner`` is made from.
        refused: The error, and what its message has to match, where it is refused.
        before: Called with the network, the optimizer and the step's number before each step.
        after: Called with the network between backward and the step.
        schedulers: What to try; each makes a scheduler of an optimizer.
        closure: The step takes a closure.
        device: Where the network is.
        tolerance: For assert_close, where float32's default is too strict.
    """

    inner: Callable[..., torch.optim.Optimizer]
    make: Callable[[], nn.Module] = nets.Net
    groups: Callable[[nn.Module], list] = lambda net: list(net.parameters())
    refused: tuple[type[Exception], str] | None = None
    before: Callable[[nn.Module, torch.optim.Optimizer, int], object] = lambda net, optimizer, n: None
    after: Callable[[nn.Module], object] = lambda net: None
    schedulers: tuple[Callable[[torch.optim.Optimizer], object] | None, ...] = (None,)
    closure: bool = False
    device: str = "cpu"
    tolerance: Mapping[str, float] = field(default_factory=dict)

    @property
    def word(self):
        return YES if self.refused is None else REFUSED

    def check(self, rule):
        """Check that the parameters are those of the bare inner optimizer whose gradients are made by hand."""
        for scheduler in self.schedulers:
            net, reference = (nets.seeded(self.make).to(self.device) for _ in range(2))
            optimizer = GradientAligner(self.inner(self.groups(net)), rule_of(rule), collector=RULES[rule])
            self._train(net, optimizer, optimizer.backward, scheduler)
            plain = self.inner(self.groups(reference))
            self._train(reference, plain, partial(by_hand, rule, plain), scheduler)
            oracle.assert_same(list(net.parameters()), list(reference.parameters()), **self.tolerance)
            untrained = nets.seeded(self.make).to(self.device)
            for part in ("body.0.weight", "heads.0.weight"):
                assert not torch.equal(net.get_parameter(part), untrained.get_parameter(part))

    def _train(self, net, optimizer, backward, scheduler):
        schedule = None if scheduler is None else scheduler(optimizer)

        def evaluate():
            optimizer.zero_grad()
            losses = net.losses()
            backward(losses)
            self.after(net)
            return sum(losses.values()).detach()

        for n in range(STEPS):
            self.before(net, optimizer, n)
            if self.closure:
                optimizer.step(evaluate)
            else:
                loss = evaluate()
                optimizer.step()
            if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
                schedule.step(loss + n)
            elif schedule is not None:
                schedule.step()


def by_hand(rule, optimizer, losses):
    """Write into ``p.grad`` of the optimizer's parameters what the rule makes of the losses."""
    if rule == "sum":
        sum(losses.values()).backward()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p, gradient in zip(parameters, oracle.combined(rule, oracle.raw(losses, parameters)), strict=True):
        p.grad = gradient


def two_groups(net):
    return [
        {"params": list(net.body.parameters())},
        {"params": list(net.heads.parameters()), "lr": 0.3, "weight_decay": 0.1},
    ]


def heads_join(net, optimizer, n):
    if n == 2:
        optimizer.add_param_group({"params": list(net.heads.parameters()), "lr": 0.3})


def body_rests(net, optimizer, n):
    net.body[0].requires_grad_(n in (0, 3))


def clip_norm(net):
    before = [p.grad.clone() for p in net.parameters()]
    nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    assert not torch.equal(before[0], net.body[0].weight.grad)


def clip_value(net):
    nn.utils.clip_grad_value_(net.parameters(), 0.01)
    assert max(p.grad.abs().max() for p in net.parameters()) == torch.tensor(0.01)


# Adam divides each element by its size: the rounding of the smallest gradients is amplified.
ADAM = {"rtol": 1e-4, "atol": 1e-5}
# Every evaluation but the first is at a point that is itself rounded.
LBFGS = {"rtol": 1e-3, "atol": 1e-4}

sgd = partial(SGD, lr=0.1, momentum=0.9)

LOOPS = {
    "`AdamW(foreach=True)`": Loop(partial(AdamW, lr=0.01, foreach=True), tolerance=ADAM),
    "`AdamW(fused=True)`": Loop(partial(AdamW, lr=0.01, fused=True), tolerance=ADAM),
    "`SGD(fused=True)`": Loop(partial(SGD, lr=0.1, momentum=0.9, fused=True)),
    "`AdamW(capturable=True)`": Loop(
        partial(AdamW, lr=0.01, capturable=True), device="cuda", tolerance={"rtol": 1e-3, "atol": 1e-4}
    ),
    "`LBFGS` by `step(closure)`": Loop(partial(torch.optim.LBFGS, lr=0.3, max_iter=3), closure=True, tolerance=LBFGS),
    "`SparseAdam`": Loop(
        torch.optim.SparseAdam,
        make=partial(nets.Words, sparse=True),
        refused=(ValueError, "must have dense gradients, got a torch.sparse_coo one"),
    ),
    "`clip_grad_norm_`": Loop(sgd, after=clip_norm),
    "`clip_grad_value_`": Loop(sgd, after=clip_value),
    "learning-rate schedulers": Loop(
        sgd,
        schedulers=(
            lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=STEPS + 1),
            lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
            lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
        ),
    ),
    "several parameter groups": Loop(sgd, groups=two_groups),
    "`add_param_group` in mid-training": Loop(sgd, groups=lambda net: list(net.body.parameters()), before=heads_join),
    "freezing and thawing in mid-training": Loop(sgd, before=body_rests),
}
