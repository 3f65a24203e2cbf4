"""D_k against <g_k, g_a> by autograd, in forward mode and by central differences."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from gradalign.collectors.directional import DirectionalDerivatives
from tests.auxiliaries import (
    AUXILIARIES,
    BOUNDS,
    DIFFERENCES,
    FORWARD,
    EarlyExit,
    Opaque,
    anchor,
    assert_exact,
    by_a_number,
    by_detach_and_then_in_place,
    by_detach_in_place,
    by_inference_mode,
    by_torch_detach,
    mutual,
)


def trained(model, x, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        anchor(model(x)).backward()
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 20])
@pytest.mark.parametrize("arithmetic", ["float64", "float32", "bfloat16", "autocast", "autocast outside"])
@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_exact(auxiliary, way, arithmetic, steps):
    model, x = EarlyExit(), torch.randn(32, 6)
    trained(model, x, steps)
    if "autocast" not in arithmetic:
        dtype = getattr(torch, arithmetic)
        model, x = model.to(dtype), x.to(dtype)

    def main():
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in arithmetic):
            return anchor(model(x))

    def probe():
        with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
            return auxiliary(model, x)

    def within():
        return auxiliary(model, x)

    outside = arithmetic == "autocast outside"
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        made = within if outside else probe
        assert_exact(list(model.parameters()), main, made, way, BOUNDS[way, arithmetic])


@pytest.mark.parametrize(
    ("auxiliary", "way"),
    [
        (auxiliary, way)
        for way in (FORWARD, DIFFERENCES)
        for auxiliary in (
            by_torch_detach,
            by_inference_mode,
            by_detach_in_place,
            by_detach_and_then_in_place,
            by_a_number,
        )
    ],
)
def test_other_ways_to_stop_gradients(auxiliary, way):
    model, x = EarlyExit(), torch.randn(32, 6)
    assert_exact(
        list(model.parameters()), lambda: anchor(model(x)), lambda: auxiliary(model, x), way, BOUNDS[way, "float32"]
    )


@pytest.mark.parametrize("kind", ["head", "low rank"])
@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_matrices_that_began_at_zero_do_not_shrink_the_step(kind, lr):
    model, x = EarlyExit(), torch.randn(32, 6)
    if kind == "head":
        nn.init.zeros_(model.heads[-1].weight)
        parameters = list(model.parameters())
    else:
        parameters = [p for block in model.body for p in low_rank(block[0])]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    anchor(model(x)).backward()
    optimizer.step()
    assert_exact(
        parameters, lambda: anchor(model(x)), lambda: mutual(model, x), DIFFERENCES, BOUNDS[DIFFERENCES, "float32"]
    )


def low_rank(linear):
    """Freeze a layer but for a product of two thin matrices, the second zero, that is added to its weight."""
    pair = LowRank(linear.weight.shape)
    linear.requires_grad_(False)
    nn.utils.parametrize.register_parametrization(linear, "weight", pair)
    return list(pair.parameters())


class LowRank(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, shape[1]) / 4)
        self.up = nn.Parameter(torch.zeros(shape[0], 2))

    def forward(self, weight):
        return weight + self.up @ self.down


def test_a_probe_that_leaves_gradients_switched_off_harms_no_other():
    w = nn.Parameter(torch.randn(3))

    def leaving():
        loss = w.square().sum()
        torch.set_grad_enabled(False)
        return {"k": (loss,)}

    for probe in (leaving, lambda: {"k": (w.square().sum(),)}):
        D = DirectionalDerivatives()(probe, [w], [torch.ones(3)])["k"]
        torch.testing.assert_close(D, 2 * w.detach().sum().double())
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_rows_drawn_by_python_and_numpy_are_the_same_at_every_call(way):
    w, table = nn.Parameter(torch.randn(4)), torch.randn(50, 4)

    def auxiliary():
        rows = [*random.sample(range(50), 5), *np.random.permutation(50)[:5].tolist()]
        return (table[rows] @ w).exp().mean()

    random.seed(0)
    np.random.seed(0)
    state, of_numpy = random.getstate(), np.random.get_state()
    exact = torch.autograd.grad(auxiliary(), w)[0].double().sum()
    random.setstate(state)
    np.random.set_state(of_numpy)
    made = auxiliary if way == FORWARD else lambda: Opaque.apply(auxiliary())
    D = DirectionalDerivatives()(lambda: {"k": (made(),)}, [w], [torch.ones(4)])["k"]
    # A difference quotient of float32 losses: its error is of the cube root of their rounding, (6e-8)^(2/3) = 1.5e-5
    # relative at its best step; forward mode is held to the same.
    torch.testing.assert_close(D, exact, rtol=1e-3, atol=1e-4)
