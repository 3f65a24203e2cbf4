"""D_k from call to call: scales, zeros, other parameters, and what the probe sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradalign.collectors.directional import DirectionalDerivatives
from tests.auxiliaries import (
    BOUNDS,
    DIFFERENCES,
    FORWARD,
    EarlyExit,
    Opaque,
    anchor,
    assert_exact,
    mutual,
    without_teacher,
)


def test_a_number_read_from_a_tensor_stays():
    w = nn.Parameter(torch.randn(3, 4))
    assert_exact(
        [w], lambda: w.sin().sum(), lambda: w.square().sum() * w.exp().sum().item(), FORWARD, BOUNDS[FORWARD, "float32"]
    )


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("of", ["anchor", "auxiliary", "both"])
def test_any_scale_of_the_losses(way, scale, of):
    model, x = EarlyExit(), torch.randn(32, 6)
    main_scale, scale_k = (scale if of != "auxiliary" else 1.0), (scale if of != "anchor" else 1.0)
    assert_exact(
        list(model.parameters()),
        lambda: anchor(model(x)) * main_scale,
        lambda: mutual(model, x) * scale_k,
        way,
        BOUNDS[way, "float32"],
    )


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_weights_that_are_zero(way):
    w = nn.Parameter(torch.zeros(3, 4))
    x = torch.randn(5, 4)
    assert_exact([w], lambda: F.linear(x, w).sum(), lambda: F.linear(x, w).exp().sum(), way, BOUNDS[way, "float32"])


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_along_nothing_it_is_zero(way):
    w = nn.Parameter(torch.randn(3, 4))
    before = w.detach().clone()
    derivatives = DirectionalDerivatives()
    make = Opaque.apply if way == DIFFERENCES else torch.clone
    D = derivatives(lambda: {"k": (make(w.exp().sum()),)}, [w], [torch.zeros(3, 4)])
    assert D["k"].item() == 0
    assert torch.equal(w, before)


def test_by_hand():
    # D = d/dt (theta + t g)^2 / 2 = <theta, g> = 3 * 2 + 4 * -1; a constant's is 0, and two terms are summed.
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    # Forward mode is exact on these numbers; a difference quotient of float32 losses has some 1e-5 of relative error.
    for make, rtol in ((torch.clone, 0.0), (Opaque.apply, 1e-3)):
        D = DirectionalDerivatives()(
            lambda make=make: {
                "half": (make(w.square().sum() / 2),),
                "two": (w[0].reshape(1), w[1] * 2),
            },
            [w],
            [torch.tensor([2.0, -1.0])],
        )
        expected = {"half": 2.0, "two": 0.0}
        for name, value in expected.items():
            torch.testing.assert_close(D[name].item(), value, rtol=rtol, atol=rtol)


def test_differences_serve_other_parameters_at_every_step():
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
    derivatives = DirectionalDerivatives()
    for parameters in ([a, b], [a], [b], [a, b]):
        assert_exact(
            parameters,
            lambda parameters=parameters: sum(p.sin().sum() for p in parameters),
            lambda: a.square().sum() + b.exp().sum(),
            DIFFERENCES,
            BOUNDS[DIFFERENCES, "float32"],
            derivatives=derivatives,
        )


def test_differences_replay_a_detach_that_begins_later():
    w, derivatives = nn.Parameter(torch.randn(3)), DirectionalDerivatives()
    for auxiliary in (lambda: w.exp().sum(), lambda: torch.dot(w, w.detach().exp()), lambda: w.exp().sum()):
        assert_exact(
            [w], lambda: w.sin().sum(), auxiliary, DIFFERENCES, BOUNDS[DIFFERENCES, "float32"], derivatives=derivatives
        )


def test_differences_take_the_step_of_an_autocast_that_begins_later():
    model, x, derivatives = EarlyExit(), torch.randn(32, 6), DirectionalDerivatives()
    for enabled in (False, True):

        def auxiliary(enabled=enabled):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return without_teacher(model, x)

        assert_exact(
            list(model.parameters()),
            lambda: anchor(model(x)),
            auxiliary,
            DIFFERENCES,
            BOUNDS[DIFFERENCES, "autocast"],
            derivatives=derivatives,
        )


def test_another_number_of_detached_values_at_another_call_is_refused():
    w, calls = nn.Parameter(torch.randn(3)), iter(range(10))

    def auxiliary():
        loss = w * w.detach()
        return {"k": (Opaque.apply(loss.sum() if next(calls) < 2 else (loss * w.detach()).sum()),)}

    with pytest.raises(ValueError, match=r"`probe` must compute the same at every call, but it stopped gradients"):
        DirectionalDerivatives()(auxiliary, [w], [torch.ones(3)])


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_what_the_probe_sees_of_a_parameter(way):
    w = nn.Parameter(torch.randn(3))
    w.grad = torch.ones(3)
    seen = []

    def auxiliary():
        seen.append((w.requires_grad, w.is_leaf, w.grad is not None, torch.is_grad_enabled()))
        loss = (w.exp() if w.requires_grad else w * 0).sum()
        return {"k": (Opaque.apply(loss) if way == DIFFERENCES else loss,)}

    with torch.no_grad():
        DirectionalDerivatives()(auxiliary, [w], [torch.ones(3)])
    assert set(seen) == {(True, True, True, True)}
    assert w.requires_grad
    assert w.is_leaf


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_how_often_the_probe_is_called(way):
    w, calls = nn.Parameter(torch.randn(3)), []

    def auxiliary(stops):
        calls.append(None)
        loss = (w * (w.detach() if stops else 2)).sum()
        return {"k": (Opaque.apply(loss) if way == DIFFERENCES else loss,)}

    derivatives = DirectionalDerivatives()
    counts = []
    for _ in range(2):
        calls.clear()
        derivatives(lambda: auxiliary(True), [w], [torch.ones(3)])
        counts.append(len(calls))
    # One in forward mode; one in vain, then one at theta and one at each side.
    assert counts == ([1, 1] if way == FORWARD else [4, 3])


def test_no_graph_is_kept():
    model, x = EarlyExit(), torch.randn(32, 6)
    made = []

    def auxiliary():
        made.append(without_teacher(model, x))
        return {"k": (made[-1],)}

    parameters = list(model.parameters())
    DirectionalDerivatives()(auxiliary, parameters, [torch.ones_like(p) for p in parameters])
    assert made[0].grad_fn is None
