"""Rows of the first table that take more than one step, or look at more than ``p.grad``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.compatibility import nets, oracle
from tests.compatibility.cells import COLLECTORS, backward, evaluated, wrapped


def auxiliary_comes_and_goes(row, collector):
    """Check steps whose groups differ, and one without auxiliaries; under GA that is plain backward."""
    for rule in COLLECTORS[collector]:
        net, reference = row.network(), row.network()
        optimizer = wrapped(net, collector, rule)
        plain = torch.optim.SGD(reference.parameters(), lr=0.1)
        steps = [("main", "against"), ("main",), ("main", "far"), ("main", "against")]
        if rule == "ga-soft":  # PCGrad of three depends on an order drawn
            steps.append(("main", "against", "far"))
        for names in steps:
            optimizer.zero_grad()
            if rule == "ga-soft" and len(names) == 1:
                three_losses(net)["main"].backward()
            else:
                backward(optimizer, lambda net=net, names=names: chosen(three_losses(net), names), collector)
                assert optimizer.report.names == names
            optimizer.step()
            plain.zero_grad()
            losses = evaluated(lambda net=reference, names=names: chosen(three_losses(net), names), collector)
            of_rule = "sum" if len(names) == 1 else rule
            set_gradients(reference, oracle.combined(of_rule, oracle.raw(losses, list(reference.parameters()))))
            plain.step()
        oracle.assert_same(list(net.parameters()), list(reference.parameters()))


def three_losses(net):
    hidden = net.body(net.inputs())
    first, second = (head(hidden) for head in net.heads)
    return nets.two_losses(first, second) | {"far": hidden.square().mean()}


def chosen(losses, names):
    return {name: losses[name] for name in names}


def set_gradients(net, gradients):
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        p.grad = gradient


class Adversaries(nn.Module):
    """A generator that is to please a discriminator and to stay near a target, and the discriminator."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def of_generator(self):
        made = self.generator(nets.inputs(5, 3))
        return {"near": (made - 1).square().mean(), "please": F.softplus(-self.discriminator(made)).mean()}

    def of_discriminator(self):
        real = nets.inputs(5, 4).requires_grad_()
        verdict = self.discriminator(real)
        (slope,) = torch.autograd.grad(verdict.sum(), real, create_graph=True)
        made = self.generator(nets.inputs(5, 3)).detach()
        return {
            "tell": F.softplus(-verdict).mean() + F.softplus(self.discriminator(made)).mean(),
            "smooth": slope.square().sum(1).mean(),
        }


def generator_and_discriminator(row, collector):
    """Check a GAN: an aligner for each network, in turns, one network's losses passing through the other."""
    for rule in COLLECTORS[collector]:
        net, reference = nets.seeded(Adversaries), nets.seeded(Adversaries)
        aligners = {part: wrapped(getattr(net, part), collector, rule) for part in ("generator", "discriminator")}
        plain = {part: torch.optim.SGD(getattr(reference, part).parameters(), lr=0.1) for part in aligners}
        for part in ("discriminator", "generator") * 2:
            other = "generator" if part == "discriminator" else "discriminator"
            aligners[part].zero_grad()
            before = [p.grad for p in getattr(net, other).parameters()]
            backward(aligners[part], getattr(net, f"of_{part}"), collector)
            after = [p.grad for p in getattr(net, other).parameters()]
            assert all(one is two for one, two in zip(before, after, strict=True))
            aligners[part].step()
            parameters = list(getattr(reference, part).parameters())
            losses = evaluated(getattr(reference, f"of_{part}"), collector)
            set_gradients(getattr(reference, part), oracle.combined(rule, oracle.raw(losses, parameters)))
            plain[part].step()
        oracle.assert_same(list(net.parameters()), list(reference.parameters()))


def read_by_hooks(row, collector):
    """Check that a hook may read each group's gradient, once a group; probed, the main loss's alone."""
    for rule in COLLECTORS[collector]:
        net, reference, seen = row.network(), row.network(), []
        net.body[0].weight.register_hook(lambda gradient, seen=seen: seen.append(gradient.norm().item()))
        backward(wrapped(net, collector, rule), net.losses, collector)
        rows = oracle.raw(reference.losses(), list(reference.parameters()))
        expected = [gradients[0].norm().item() for gradients in rows]
        assert seen == pytest.approx(expected[:1] if collector == "probed" else expected, rel=1e-6)
        oracle.assert_same(oracle.taken(net.parameters()), oracle.combined(rule, rows), zeros_may_lack=True)


def changed_by_hooks(row, collector):
    """Check that a hook changes each group's gradient before it is aligned; probed, the main loss's alone."""
    for rule in COLLECTORS[collector]:
        net, reference = row.network(), row.network()
        for one in (net, reference):
            one.body[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        backward(wrapped(net, collector, rule), net.losses, collector)
        parameters = list(reference.parameters())
        rows = oracle.raw(reference.losses(), parameters)  # torch.autograd.grad runs the hook
        unhooked = row.network()
        untouched = oracle.raw(unhooked.losses(), list(unhooked.parameters()))
        assert all(not torch.equal(one[0], other[0]) for one, other in zip(rows, untouched, strict=True))
        if collector == "probed":
            rows[1:] = untouched[1:]
        oracle.assert_same(oracle.taken(net.parameters()), oracle.combined(rule, rows), zeros_may_lack=True)


def run_after_accumulation(row, collector):
    """Check that the hook runs once for each parameter that a group reaches, when its ``p.grad`` is written."""
    for rule in COLLECTORS[collector]:
        net, seen = row.network(), {}
        for i, p in enumerate(net.parameters()):
            p.register_post_accumulate_grad_hook(
                lambda p, i=i, seen=seen: seen.setdefault(i, []).append(p.grad.clone())
            )
        backward(wrapped(net, collector, rule), net.losses, collector)
        reference = row.network()
        parameters = list(reference.parameters())
        expected = oracle.combined(rule, oracle.raw(reference.losses(), parameters))
        assert all(len(calls) == 1 for calls in seen.values())
        actual = [seen[i][0] if i in seen else None for i in range(len(parameters))]
        oracle.assert_same(actual, expected, zeros_may_lack=collector == "probed")
        assert [p.grad is not None for p in net.parameters()] == [i in seen for i in range(len(parameters))]
