from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from gradalign import GradAlignError, GradientAligner, NonFiniteError, rules
from tests import models


def make(nonfinite, rule="sum", inner=torch.optim.SGD, **options):
    model = models.make(models.TwoHeads)
    return model, GradientAligner(inner(model.parameters(), lr=0.1), rule, nonfinite=nonfinite, **options)


def broken(model, bad=torch.nan):
    losses = model.losses()
    return {"first": losses["first"], "second": losses["second"] * bad}


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_raise_names_every_broken_group():
    model, optimizer = make("raise")
    losses = model.losses()
    with pytest.raises(NonFiniteError, match=r"loss group 'a' and 'c' must be finite") as caught:
        optimizer.backward({"a": losses["first"] * torch.nan, "b": losses["first"], "c": losses["second"] * torch.inf})
    assert caught.value.groups == ("a", "c")
    assert isinstance(caught.value, GradAlignError)


def test_raise_sees_parameters_outside_the_scope():
    model = models.make(models.TwoHeads)
    optimizer = GradientAligner(torch.optim.SGD(model.parameters()), "sum", scope=[model.first.weight])
    with pytest.raises(NonFiniteError, match="'second'"):
        optimizer.backward(broken(model))


MADE = {
    "constant": rules.Constant([1, 1]),
    "momentum-weights": rules.MomentumWeights("pcgrad"),
    "trimmed-mean": rules.TrimmedMean(trim=0),
}


@pytest.mark.parametrize("rule", [name for name in rules.names() if name != "krum"])  # which needs three groups
def test_no_rule_hides_a_broken_group(rule):
    model, optimizer = make("raise", MADE.get(rule, rule))
    with pytest.raises(NonFiniteError, match="'second'"):
        optimizer.backward(broken(model))


def test_skip_leaves_the_step_out_and_counts_it():
    model, optimizer = make("skip", inner=torch.optim.AdamW)
    before = parameters(model)
    optimizer.backward(broken(model))
    assert optimizer.report.skipped
    assert optimizer.report.weights.isnan().all()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert same(before, parameters(model))
    assert not optimizer.state
    assert optimizer.skipped_steps == 1
    optimizer.zero_grad()
    optimizer.backward(model.losses())
    assert not optimizer.report.skipped
    optimizer.step()
    assert not same(before, parameters(model))
    assert optimizer.skipped_steps == 1


def test_skip_leaves_out_the_step_even_where_grad_holds_something():
    model, optimizer = make("skip")
    optimizer.backward(model.losses())
    optimizer.backward(broken(model))
    before = parameters(model)
    optimizer.step()
    assert same(before, parameters(model))


def test_zero_grad_forgets_the_skip():
    model, optimizer = make("skip")
    optimizer.backward(broken(model))
    optimizer.zero_grad()
    optimizer.backward(model.losses())
    before = parameters(model)
    optimizer.step()
    assert not same(before, parameters(model))


def test_a_new_step_begun_by_the_model_forgets_the_skip():
    model, optimizer = make("skip")
    optimizer.backward(broken(model))
    model.zero_grad()
    optimizer.backward(model.losses())
    before = parameters(model)
    optimizer.step()
    assert not same(before, parameters(model))


def test_a_skip_concerns_one_step():
    model, optimizer = make("skip")
    optimizer.backward(broken(model))
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = parameters(model)
    optimizer.step()
    assert not same(before, parameters(model))


def test_a_skip_before_a_closure_does_not_concern_it():
    model, optimizer = make("skip")
    optimizer.backward(broken(model))
    before = parameters(model)

    def closure():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return torch.tensor(1.0)

    optimizer.step(closure)
    assert not same(before, parameters(model))


def test_an_overflow_under_a_grad_scaler_propagates_to_it():
    model, optimizer = make("propagate")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = parameters(model)
    optimizer.backward({name: scaler.scale(loss) for name, loss in broken(model, torch.inf).items()})
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert same(before, parameters(model))


def test_skip_within_a_closure_leaves_the_step_out_and_returns_the_loss():
    model, optimizer = make("skip", inner=torch.optim.AdamW)

    def closure():
        optimizer.zero_grad()
        losses = broken(model)
        optimizer.backward(losses)
        return losses["first"]

    before = parameters(model)
    assert torch.equal(optimizer.step(closure), model.losses()["first"])
    assert same(before, parameters(model))
    assert not optimizer.state
    assert optimizer.skipped_steps == 1


def test_skip_cannot_undo_half_a_step():
    model = models.make(models.TwoHeads)
    optimizer = GradientAligner(torch.optim.LBFGS(model.parameters(), max_iter=4), "sum", nonfinite="skip")
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        losses = model.losses() if len(calls) < 2 else broken(model)
        optimizer.backward(losses)
        return sum(model.losses().values())

    with pytest.raises(
        GradAlignError, match=r"must stay finite within step\(closure\), got NaN or infinity at evaluation 2"
    ):
        optimizer.step(closure)


@pytest.mark.parametrize("rule", ["sum", "mean", "ga-soft", "ga-hard", "pcgrad"])
def test_propagate_writes_what_is_not_finite(rule):
    model, optimizer = make("propagate", rule)
    optimizer.backward(broken(model))
    assert model.trunk.weight.grad.isnan().all()


@dataclass(frozen=True, eq=False)
class Faulty(rules.Rule):
    """A rule with a division by zero in it."""

    name: ClassVar[str] = "faulty"

    def _weights(self, G, names):
        return G[..., 0] / 0.0

    def plain_weights(self, names):
        return (1.0,) * len(names)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_weights_that_are_not_finite_are_the_rules_fault(nonfinite):
    model, optimizer = make(nonfinite, Faulty())
    with pytest.raises(GradAlignError, match=r"The weights of Faulty\(\) must be finite, got .* from finite gradients"):
        optimizer.backward(model.losses())
    assert all(p.grad is None for p in model.parameters())
