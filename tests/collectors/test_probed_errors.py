"""What a probe must be, and what becomes of a step whose losses are not finite or whose probe fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradalign import GradientAligner, rules
from gradalign.errors import NonFiniteError
from gradalign.rules import GASoft
from tests import models
from tests.auxiliaries import DIFFERENCES, FORWARD, WAYS, EarlyExit, anchor, by_no_grad, finish, mutual, wrapped


def refused(error, match, *, losses=None, probe=None, rule=None, **options):
    """Assert that ``backward`` raises and leaves everything as it was."""
    model = models.make(models.TwoHeads)
    chosen = {name: loss for name, loss in model.losses().items() if name in (losses or ("first",))}
    state = torch.get_rng_state()
    before = [p.detach().clone() for p in model.parameters()]
    probe = probe if probe is not None else lambda: {"second": model.losses()["second"]}

    def run():
        GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule or GASoft(0.4), **options).backward(
            chosen, probe=probe
        )

    with pytest.raises(error, match=match):
        run()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("probe", [{"kd": 1.0}, torch.ones(()), "kd", 3])
def test_a_probe_that_is_no_function(probe):
    refused(TypeError, r"`probe` must be a function without arguments that returns losses, got ", probe=probe)


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (torch.ones(()), TypeError, r"`probe\(\)` must map each loss group's name to a scalar loss, got Tensor"),
        (None, TypeError, r"`probe\(\)` must map each loss group's name to a scalar loss, got NoneType"),
        ({}, ValueError, r"`probe\(\)` must hold at least one loss group, got none"),
        ({"kd": []}, ValueError, r"`probe\(\)\['kd'\]` must hold at least one loss, got an empty sequence"),
        ({"kd": torch.ones(2)}, ValueError, r"`probe\(\)\['kd'\]` must be scalar, got shape \(2,\)"),
        ({"kd": 3.0}, TypeError, r"`probe\(\)\['kd'\]` must be a scalar tensor or a sequence of them, got float"),
        ({"kd": torch.ones((), dtype=torch.long)}, TypeError, r"`probe\(\)\['kd'\]` must be a real floating-point"),
        ({1: torch.ones(())}, TypeError, r"`probe\(\)` must have names \(strings\) as keys, got 1"),
    ],
)
def test_what_a_probe_must_return(returned, error, match):
    refused(error, match, probe=lambda: returned)


@pytest.mark.parametrize("rule", ["sum", "pcgrad", "mgda", "upgrad"])
def test_a_rule_that_combines_all_gradients_is_refused(rule):
    name = type(rules.get(rule)).__name__
    refused(ValueError, rf"`probe` must be None with {name}\(.*\), which combines all gradients", rule=rule)
    refused(ValueError, rf"`collector` must be 'stacked' or 'auto' with {name}", rule=rule, collector="probed")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scope": "shared"}, r"`scope` must be 'all' {}, got 'shared'"),
        ({"granularity": "tensor"}, r"`granularity` must be 'global' {}, got 'tensor'"),
        ({"granularity": "param_group"}, r"`granularity` must be 'global' {}, got 'param_group'"),
    ],
)
def test_one_gramian_alone_is_probed(options, match):
    refused(ValueError, match.format("with a `probe`"), **options)
    refused(ValueError, match.format("with collector='probed'"), collector="probed", **options)


def test_parameters_of_choice_are_not_probed():
    model = models.make(models.TwoHeads)
    optimizer = wrapped(model, scope=[model.trunk.weight])
    with pytest.raises(ValueError, match=r"`scope` must be 'all' with a `probe`, got parameters of your choice"):
        optimizer.backward({"first": model.losses()["first"]}, probe=lambda: {"second": model.losses()["second"]})


def test_probed_without_a_probe():
    model = models.make(models.TwoHeads)
    optimizer = wrapped(model, collector="probed")
    with pytest.raises(ValueError, match=r"`probe` must be given with collector='probed', got None"):
        optimizer.backward(model.losses())


@pytest.mark.parametrize("collector", ["stacked", "streamed"])
def test_other_collectors_take_no_probe(collector):
    refused(ValueError, rf"`probe` must be None with collector='{collector}', got a function", collector=collector)


def test_two_groups_beside_a_probe():
    match = r"`losses` must hold the anchor's loss alone beside a `probe`, got the groups \['first', 'second'\]"
    refused(ValueError, match, losses=("first", "second"))


@pytest.mark.parametrize("chosen", ["second", 1])
def test_another_loss_than_the_anchor(chosen):
    match = r"`losses` must hold the anchor of GASoft\(.*\) beside a `probe`, got 'first'"
    refused(ValueError, match, rule=GASoft(0.4, anchor=chosen))


def test_an_anchor_that_no_group_has():
    refused(ValueError, r"nowhere", rule=GASoft(0.4, anchor="nowhere"))


def test_a_probe_that_names_the_anchor_again():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GradientAligner(torch.optim.SGD([w], lr=0.1), GASoft(alpha=0.5))
    with pytest.raises(ValueError, match=r"`probe\(\)` must not name the anchor, 'ce'"):
        optimizer.backward({"ce": w[0]}, probe=lambda: {"ce": w.sum()})
    assert w.grad is None


NAN, INF = float("nan"), float("inf")


def sick(nonfinite, way, **factors):
    model, x = EarlyExit(), torch.randn(32, 6)
    optimizer = wrapped(model, nonfinite=nonfinite)
    ce = anchor(model(x)) * factors.get("ce", 1.0)
    made = {"kd": mutual, "teacher": by_no_grad}
    return (
        model,
        optimizer,
        {"ce": ce},
        lambda: {name: finish(way, f(model, x) * factors.get(name, 1.0)) for name, f in made.items()},
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("group", "factor"), [("kd", NAN), ("teacher", NAN), ("kd", INF)])
def test_nan_is_named(way, group, factor):
    model, optimizer, losses, probe = sick("raise", way, **{group: factor})
    with pytest.raises(
        NonFiniteError, match=rf"The gradient of loss group '{group}' must be finite, got NaN"
    ) as raised:
        optimizer.backward(losses, probe=probe)
    assert raised.value.groups == (group,)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "way",
    [
        FORWARD,
        DIFFERENCES,
    ],
)
def test_nan_in_the_anchor_is_not_blamed_on_others(way):
    _, optimizer, losses, probe = sick("raise", way, ce=NAN)
    with pytest.raises(NonFiniteError, match=r"loss group 'ce' must be finite") as raised:
        optimizer.backward(losses, probe=probe)
    assert raised.value.groups == ("ce",)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", ["ce", "kd"])
def test_nan_is_skipped(way, group):
    model, optimizer, losses, probe = sick("skip", way, **{group: NAN})
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.backward(losses, probe=probe)
    assert optimizer.report.skipped
    assert optimizer.report.weights.isnan().all()
    assert optimizer.skipped_steps == 1
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", ["ce", "kd"])
def test_nan_is_propagated(way, group):
    model, optimizer, losses, probe = sick("propagate", way, **{group: NAN})
    optimizer.backward(losses, probe=probe)
    assert all(p.grad.isnan().all() for p in model.parameters())
    assert not any(p.isnan().any() for p in model.parameters())


def accumulated(first, last, *, steps_before=0):
    """Run a micro-batch, and a last one."""
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GradientAligner(torch.optim.SGD([w], lr=0.1), GASoft(alpha=0.5))
    for _ in range(steps_before):
        optimizer.backward({"ce": w[0] * 2}, probe=lambda: {"kd": w.sum()})
        optimizer.zero_grad()
    with optimizer.accumulate():
        optimizer.backward(*first(w)[:1], probe=first(w)[1])
    optimizer.backward(*last(w)[:1], probe=last(w)[1])
    return optimizer


def probing(*names):
    return lambda w: ({"ce": w[0] * 2}, lambda: dict.fromkeys(names, w.sum()))


def test_micro_batches_whose_probes_differ():
    match = r"`probe` must return the same loss groups for every micro-batch, got \['kd'\] and \['mse'\]"
    with pytest.raises(ValueError, match=match):
        accumulated(probing("kd"), probing("mse"))


def test_a_probe_missing_in_a_later_micro_batch():
    with pytest.raises(ValueError, match=r"`probe` must be given for every micro-batch or for none, got None"):
        accumulated(probing("kd"), lambda w: ({"ce": w[0] * 2, "kd": w.sum()}, None))


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_probe_missing_beside_the_anchor_alone(steps_before):
    with pytest.raises(ValueError, match=r"`probe` must be given for every micro-batch or for none, got None"):
        accumulated(probing("kd"), lambda w: ({"ce": w[0] * 2}, None), steps_before=steps_before)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_another_anchor_in_a_later_micro_batch(steps_before):
    with pytest.raises(ValueError, match=r"`losses` must keep the loss groups \['ce'\] while micro-batches wait"):
        accumulated(probing("kd"), lambda w: ({"wrong": w[0] * 2}, lambda: {"kd": w.sum()}), steps_before=steps_before)


def test_a_probe_in_a_later_micro_batch_alone():
    with pytest.raises(ValueError, match=r"`probe`"):
        accumulated(
            lambda w: ({"ce": w[0] * 2, "kd": w.sum()}, None),
            lambda w: ({"ce": w[0] * 2, "kd": w.sum()}, lambda: {"mse": w.sum()}),
        )


def test_micro_batches_that_wait_are_dropped_with_their_probes():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GradientAligner(torch.optim.SGD([w], lr=0.1), GASoft(alpha=0.5))
    with optimizer.accumulate():
        optimizer.backward({"ce": w[1] * 9}, probe=lambda: {"other": -w.sum()})
    optimizer.zero_grad()
    optimizer.backward({"ce": w[0] * 2}, probe=lambda: {"kd": w.sum()})
    assert optimizer.report.names == ("ce", "kd")
    assert w.grad.tolist() == [1.5, 0.0]


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda w, before: (w[0] * 2).detach(), r"`probe\(\)\['kd'\]` must change with the parameters"),
        (lambda w, before: torch.ones(()), r"`probe\(\)\['kd'\]` must change with the parameters"),
        (lambda w, before: before, r"`probe` must compute its losses within its call"),
        (lambda w, before: before.square() + w.sum(), r"`probe` must compute its losses within its call"),
    ],
)
def test_a_probe_that_is_not_computed_from_the_parameters_is_refused(of, message):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    before = w.exp().sum()
    optimizer = GradientAligner(torch.optim.SGD([w], lr=0.1), GASoft(alpha=0.5))
    with pytest.raises(ValueError, match=message):
        optimizer.backward({"ce": w[0] * 2}, probe=lambda: {"kd": of(w, before)})
    assert w.grad is None


def test_an_auxiliary_of_its_own_parameters_alone_changes_nothing():
    w, own = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(2))
    optimizer = GradientAligner(torch.optim.SGD([w, own], lr=0.1), GASoft(alpha=0.5))
    optimizer.backward({"ce": w[0] * 2}, probe=lambda: {"kd": (own * w.detach()).sum()})
    assert w.grad.tolist() == [1.0, 0.0]


def test_an_error_in_the_probe_drops_what_waits():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GradientAligner(torch.optim.SGD([w], lr=0.1), GASoft(alpha=0.5))
    with pytest.raises(ZeroDivisionError, match="by zero"):
        optimizer.backward({"ce": w[1] * 9}, probe=lambda: {"kd": w.sum() * (1 // 0)})
    optimizer.backward({"ce": w[0] * 2}, probe=lambda: {"kd": w.sum()})
    assert w.grad.tolist() == [1.5, 0.0]
