"""Nothing is left of an evaluation more: random states, buffers, parameters, hooks, caches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from gradalign import GradientAligner
from gradalign.collectors.undisturbed import RandomState, spared_buffers
from gradalign.rules import GASoft
from tests.auxiliaries import DIFFERENCES, FORWARD, EarlyExit, Opaque, anchor, by_no_grad, mutual


def everything(model):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: (id(t), t.data_ptr(), t.detach().clone()) for name, t in tensors.items()}


def assert_untouched(model, before):
    after = everything(model)
    assert after.keys() == before.keys()
    for name, (identity, pointer, values) in before.items():
        assert after[name][:2] == (identity, pointer), name
        assert torch.equal(after[name][2], values), name
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert not torch_module._global_forward_pre_hooks


def make(way, auxiliary=mutual):
    model, x = EarlyExit(), torch.randn(32, 6)
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), GASoft(0.5))
    finish = Opaque.apply if way == DIFFERENCES else torch.clone
    return model, x, optimizer, lambda: {"kd": finish(auxiliary(model, x))}


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
@pytest.mark.parametrize("auxiliary", [mutual, by_no_grad])
def test_everything_is_as_before(way, auxiliary):
    model, x, optimizer, probe = make(way, auxiliary)
    for _ in range(3):
        optimizer.zero_grad()
        ce = anchor(model(x))
        before, state = everything(model), torch.get_rng_state()
        optimizer.backward({"ce": ce}, probe=probe)
        after = torch.get_rng_state()
        assert optimizer.report.derivative == way
        assert_untouched(model, before)
        assert torch.is_grad_enabled()
        assert not torch.equal(after, state)
        torch.set_rng_state(state)
        with spared_buffers():
            probe()
        assert torch.equal(torch.get_rng_state(), after)
        assert_untouched(model, before)


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_what_the_probe_draws(way):
    model, x, optimizer, probe = make(way)
    drawn = []

    def drawing():
        drawn.append(torch.rand(3))
        return probe()

    ce = anchor(model(x))
    state = torch.get_rng_state()
    optimizer.backward({"ce": ce}, probe=drawing)
    torch.set_rng_state(state)
    expected = torch.rand(3)
    assert len(drawn) == (1 if way == FORWARD else 4)
    assert all(torch.equal(one, expected) for one in drawn)


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
@pytest.mark.parametrize("error", [RuntimeError, KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("last", [False, True])
def test_a_probe_that_raises(way, error, last):
    model, x, optimizer, probe = make(way)
    ce = anchor(model(x))
    before, state, calls = everything(model), torch.get_rng_state(), []

    def raising():
        calls.append(None)
        losses = probe()
        # Under differences the second call stands at theta, the third and the fourth are shifted.
        if error is RuntimeError or len(calls) >= (4 if last and way == DIFFERENCES else 1):
            raise error("a mistake of the user's")
        return losses

    with pytest.raises(error, match="a mistake of the user's"):
        optimizer.backward({"ce": ce}, probe=raising)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    assert torch.overrides._get_current_function_mode_stack() == []
    optimizer.backward({"ce": anchor(model(x))}, probe=probe)  # and it goes on
    assert optimizer.report.derivative == way


def test_a_parameter_that_the_probe_shifts_back_to_the_same_bits():
    # 0.1 + e g - e g is not 0.1 in floating point: only a copy brings it back.
    w = nn.Parameter(torch.tensor([0.1, 1e-30, -0.0, 7.0]))
    bits = w.detach().view(torch.int32).clone()
    optimizer = GradientAligner(torch.optim.SGD([w], lr=0.1), GASoft(0.5))
    optimizer.backward(
        {"ce": (w * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()}, probe=lambda: {"kd": Opaque.apply(w.exp().sum())}
    )
    assert optimizer.report.derivative == DIFFERENCES
    assert torch.equal(w.detach().view(torch.int32), bits)


class Queue(nn.Module):
    """Buffers that are added to, written by index, reassigned, shared, and absent."""

    def __init__(self, other=None):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(3), persistent=False)
        self.register_buffer("moving", torch.zeros(3))
        self.register_buffer("absent", None)
        self.register_buffer("shared", torch.zeros(3) if other is None else other.shared)

    def forward(self, x):
        self.seen += 1
        self.last[0] = x[0, 0]
        self.moving = 0.9 * self.moving + 0.1 * x.mean(0)
        self.shared.add_(1)
        return self.linear(x)

    def by_another_name(self, x):
        self.seen += 1
        return self.linear(x)


def test_buffers_are_spared():
    first = Queue()
    model = nn.Sequential(first, nn.Dropout(0.5))
    model.append(nn.ModuleList([Queue(first)]))
    before, x = everything(model), torch.randn(4, 3)
    with spared_buffers():
        model[0](x)
        model[2][0](x)
        model[0](x)
        assert first.seen == 2
        assert (first.shared == 3).all()  # the two share one copy, as they share the buffer
    assert_untouched(model, before)
    first(x)
    assert first.seen == 1


def test_buffers_are_spared_when_the_code_raises():
    model, x = Queue(), torch.randn(4, 3)
    before = everything(model)

    def run():
        with spared_buffers():
            model(x)
            raise KeyError("the user's")

    with pytest.raises(KeyError, match="the user's"):
        run()
    assert_untouched(model, before)


def test_buffers_of_a_module_first_called_in_inference_mode():
    model, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    with spared_buffers():
        with torch.inference_mode():
            model(x)
        model(x)


def test_a_user_s_global_hook_stays():
    calls = []
    handle = torch_module.register_module_forward_pre_hook(lambda *_: calls.append(None))
    try:
        with spared_buffers():
            nn.Linear(2, 2)(torch.ones(1, 2))
        assert len(torch_module._global_forward_pre_hooks) == 1
        assert len(calls) == 1
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:.torch.jit.* is :DeprecationWarning")  # torch scripts a module here
def test_scripted_buffers_are_put_back_and_reported():
    model, reported = torch.jit.script(nn.BatchNorm1d(3)), []
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with spared_buffers(scripts=lambda: reported.append(None)):
        model(torch.randn(4, 3))
    assert reported == [None]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_spectral_norm_turns_its_vectors_back(way):
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    optimizer, x = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), GASoft(0.5)), torch.randn(4, 3)
    ce = model(x).square().mean()
    before = everything(model)
    finish = Opaque.apply if way == DIFFERENCES else torch.clone
    optimizer.backward({"ce": ce}, probe=lambda: {"kd": finish(model(x).exp().mean())})
    assert optimizer.report.derivative == way
    assert_untouched(model, before)


def test_random_state():
    state = RandomState([torch.device("cpu")])
    drawn = torch.rand(3)
    torch.rand(100)
    state.restore()
    assert torch.equal(torch.rand(3), drawn)
