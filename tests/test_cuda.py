"""What only a CUDA device can show: that nothing waits for it, and that a whole step can be captured in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradalign import GradientAligner
from gradalign.rules import GAHard, GASoft, PCGrad, Sum
from tests import models

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = {
    "stacked": (lambda: GASoft(0.3), "stacked"),
    "streamed": (lambda: GAHard(0.3), "streamed"),
    "sum": (Sum, "stacked"),
    "pcgrad": (PCGrad, "stacked"),
}


def make(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 8)).cuda()
    rule, collector = CASES[name]
    inner = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)
    return model, GradientAligner(inner, rule(), collector=collector, nonfinite="propagate")


def step(model, optimizer, inputs, targets):
    optimizer.zero_grad(set_to_none=True)
    outputs = model(inputs)
    optimizer.backward({"fit": (outputs - targets).square().mean(), "small": outputs.abs().mean()})
    optimizer.step()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 64, generator=generator).cuda(), torch.randn(32, 8, generator=generator).cuda()


@pytest.mark.parametrize("name", ["stacked", "streamed", "sum"])  # closed forms
def test_a_step_never_waits_for_the_device(name):
    model, optimizer = make(name)
    for _ in range(3):  # makes plans and the inner state
        step(model, optimizer, *batch())
    inputs, targets = batch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, optimizer, inputs, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["stacked", "streamed", "sum"])
def test_a_captured_step_is_the_step(name):
    model, optimizer = make(name)
    inputs, targets = batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer, inputs, targets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer, inputs, targets)
    for _ in range(5):
        graph.replay()
    expected, eager = make(name)
    for _ in range(3 + 5):  # to capture is not to run
        step(expected, eager, inputs, targets)
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(parameter, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", models.ALL)
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_cpu(kind, name):
    rule, collector = CASES[name]
    gradients = []
    for device in ("cpu", "cuda"):
        model = models.make(kind)
        losses = model.losses
        if device == "cuda":
            model.cuda()
            losses = on_device(model)
        optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule(), collector=collector)
        optimizer.backward(losses())
        gradients.append([None if p.grad is None else p.grad.cpu() for p in model.parameters()])
    for ours, reference in zip(*gradients[::-1], strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None:
            tolerance = 2e-2 if ours.dtype == torch.bfloat16 else 1e-3
            assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def on_device(model):
    """The model's losses with inputs made on the device."""

    def losses():
        with torch.device("cuda"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "inputs", lambda *shape: cpu_inputs(*shape).cuda())
            return model.losses()

    return losses


def cpu_inputs(*shape):
    with torch.device("cpu"):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def test_a_state_that_was_loaded_onto_the_device_is_taken(tmp_path):
    model, optimizer = make("pcgrad")
    step(model, optimizer, *batch())
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    step(model, optimizer, *batch())
    _, again = make("pcgrad")
    again.load_state_dict(torch.load(tmp_path / "run.pt", map_location="cuda", weights_only=True))
    _, other = make("pcgrad")
    other.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True))
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["gradalign"]["rule_state"]["generator"]
    assert not torch.equal(saved, optimizer.rule.state_dict()["generator"])  # it has drawn since
    for one in (again, other):
        assert torch.equal(one.rule.state_dict()["generator"], saved)
