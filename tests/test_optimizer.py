"""The wrapper is an optimizer: everything that a training loop does with one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.testing import assert_close

from gradalign import GradientAligner
from gradalign.rules import GASoft, PCGrad
from tests import models

INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def make(rule="sum", inner="adamw", **options):
    model = models.make(models.TwoHeads)
    return model, GradientAligner(INNER[inner](model.parameters()), rule, **options)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, two, **tolerance):
    for name, value in one.items():
        assert_close(two[name], value, **tolerance)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(model.losses())
        optimizer.step()


@pytest.mark.parametrize("inner", INNER)
def test_sum_trains_as_the_inner_optimizer_does(inner):
    model, optimizer = make(inner=inner)
    train(model, optimizer)
    plain = models.make(models.TwoHeads)
    reference = INNER[inner](plain.parameters())
    for _ in range(3):
        reference.zero_grad()
        sum(plain.losses().values()).backward()
        reference.step()
    # Adam divides by the gradient's size: rounding of tiny gradients is amplified.
    assert_same(parameters(plain), parameters(model), rtol=1e-4, atol=1e-5)


def test_is_an_optimizer_and_shows_the_inner_one():
    model, optimizer = make()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    assert optimizer.defaults is optimizer.inner.defaults
    train(model, optimizer, 1)
    assert optimizer.state is optimizer.inner.state
    assert set(optimizer.state) == {p for p in model.parameters() if p.grad is not None}
    assert "GASoft(anchor=0, alpha=0.3, clamp=False)" in repr(GradientAligner(optimizer.inner, GASoft(0.3)))
    assert "AdamW" in repr(optimizer)
    assert repr(optimizer.rule) == "Sum()"


def test_wrapping_leaves_a_trained_inner_optimizer_as_it_was():
    model, optimizer = make()
    train(model, optimizer)
    before = copy.deepcopy(optimizer.inner.state_dict())
    GradientAligner(optimizer.inner, "pcgrad")
    after = optimizer.inner.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        assert_same(state, after["state"][i])


def test_aliases_do_not_go_stale_after_load_state_dict():
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(0.005)
    optimizer.inner.load_state_dict(optimizer.inner.state_dict())
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(0.0025)
    assert optimizer.param_groups is optimizer.inner.param_groups


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
        ),
    ],
)
def test_schedulers_see_the_inner_groups(scheduler):
    model, optimizer = make()
    schedule = scheduler(optimizer)
    _, other = make()
    reference = scheduler(other.inner)
    for _ in range(3):
        train(model, optimizer, 1)
        other.inner.step()
        schedule.step()
        reference.step()
        assert optimizer.inner.param_groups[0]["lr"] == other.inner.param_groups[0]["lr"]


def test_grad_scaler_skips_and_steps():
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    reference, plain = make()
    train(reference, plain, 1)
    optimizer.backward({name: scaler.scale(loss) for name, loss in model.losses().items()})
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_same(parameters(reference), parameters(model), rtol=1e-4, atol=1e-5)
    before = parameters(model)
    optimizer.zero_grad()
    optimizer.backward({name: scaler.scale(loss) for name, loss in model.losses().items()})
    model.trunk.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(before, parameters(model))


def test_step_hooks_run_around_the_step():
    model, optimizer = make()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.inner.register_step_pre_hook(lambda *_: calls.append("inner"))
    train(model, optimizer, 1)
    assert calls == ["before", "inner", "after"]


def test_state_dict_hooks_run():
    _, optimizer = make()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(o is optimizer))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o is optimizer))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert calls == [True, True]


def test_hooks_on_gradients_see_the_aligned_gradient_at_step():
    model, optimizer = make("ga-soft")
    optimizer.backward(model.losses())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0)
    before = parameters(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    assert_same(before, parameters(model))


def test_add_param_group_takes_part_from_the_next_backward():
    model = models.make(models.TwoHeads)
    optimizer = GradientAligner(torch.optim.SGD(model.trunk.parameters(), lr=0.1), "sum")
    optimizer.backward(model.losses())
    assert model.first.weight.grad is None
    optimizer.add_param_group({"params": [*model.first.parameters(), *model.second.parameters()], "lr": 0.2})
    assert len(optimizer.inner.param_groups) == 2
    optimizer.zero_grad()
    optimizer.backward(model.losses())
    assert model.first.weight.grad is not None
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [model.first.weight]})


def test_step_with_a_closure_returns_its_loss():
    model, optimizer = make(inner="sgd")

    def closure():
        optimizer.zero_grad()
        losses = model.losses()
        optimizer.backward(losses)
        return sum(losses.values())

    expected = sum(model.losses().values())
    assert torch.equal(optimizer.step(closure), expected)
    assert optimizer.step(closure) < expected


def test_lbfgs():
    model = models.make(models.TwoHeads)
    optimizer = GradientAligner(torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe"), "sum")

    def closure():
        optimizer.zero_grad()
        losses = model.losses()
        optimizer.backward(losses)
        return sum(losses.values()).detach()

    first = float(optimizer.step(closure))
    assert float(optimizer.step(closure)) < 0.5 * first


@pytest.mark.parametrize("rule", [GASoft(0.3), PCGrad(seed=3)])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("options", [{}, {"scope": "shared", "granularity": "tensor"}, {"granularity": "layers"}])
def test_copies_go_on_alone_with_the_same_bits(rule, how, options):
    model = models.make(models.TwoHeads)
    if options.get("granularity") == "layers":
        options = {
            "granularity": [list(m.parameters()) for m in model.children()],
            "scope": list(model.trunk.parameters()),
        }
    optimizer = GradientAligner(torch.optim.AdamW(model.parameters(), lr=0.01), rule, **options)
    train(model, optimizer)
    pair = (model, optimizer)
    twin, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert copied.inner is not optimizer.inner
    train(model, optimizer)
    train(twin, copied)
    assert_same(parameters(model), parameters(twin), rtol=0, atol=0)
    torch.optim.lr_scheduler.StepLR(copied, step_size=1)
    calls = []
    copied.register_step_pre_hook(lambda *_: calls.append(1))
    train(twin, copied, 1)
    assert calls == [1]


def test_two_aligners_on_one_model():
    model = models.make(models.TwoHeads)
    one = GradientAligner(torch.optim.SGD(model.trunk.parameters(), lr=0.1), "sum")
    two = GradientAligner(torch.optim.SGD(model.first.parameters(), lr=0.1), "sum")
    one.backward(model.losses())
    two.backward({"first": model.losses()["first"]})
    plain = models.make(models.TwoHeads)
    sum(plain.losses().values()).backward()
    assert_close(model.trunk.weight.grad, plain.trunk.weight.grad)
    assert_close(model.first.weight.grad, plain.first.weight.grad)
    assert model.second.weight.grad is None


def test_state_of_the_bare_inner_optimizer_loads_and_the_other_way_round():
    model, optimizer = make("pcgrad")
    train(model, optimizer)
    other, fresh = make("pcgrad")
    fresh.load_state_dict(optimizer.inner.state_dict())
    assert_same(optimizer.state[model.trunk.weight], fresh.state[other.trunk.weight])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    bare = torch.optim.AdamW(models.make(models.TwoHeads).parameters())
    bare.load_state_dict(torch.load(buffer, weights_only=True))
    assert bare.param_groups[0]["lr"] == 0.01
