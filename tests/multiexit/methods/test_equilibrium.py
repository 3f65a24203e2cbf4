from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gradalign.multiexit import MultiExitResNet, methods, objectives
from gradalign.multiexit.methods import Settings, Step
from tests.multiexit.methods.small import batch, small

(STAGE,) = methods.get("gradient-equilibrium").stages


def gradients(model, inputs, labels):
    loss = STAGE.objective(Step(STAGE.forward(model, inputs, Settings()), labels))["ce"]
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("num_exits", [1, 2, 4])
def test_is_the_recursion(num_exits):
    """Layer by layer from the last, each piece of the network differentiated alone."""
    model, (inputs, labels) = small(num_exits), batch()
    plain = objectives.weighted_cross_entropy(model(**inputs), labels)
    expected = dict(zip(model.parameters(), torch.autograd.grad(plain, list(model.parameters())), strict=True))
    before, after = [], []  # hidden state before and after each layer, cut apart
    x = inputs["x"]
    for layer in model.backbone:
        before.append(x.detach().requires_grad_())
        x = layer(before[-1])
        after.append(x)
    M, later = num_exits, None
    for i in reversed(range(M)):
        hidden = after[i].detach().requires_grad_()
        logits = model.heads[i](model.pooler(hidden))
        ce = torch.nn.functional.cross_entropy(logits, labels) * (i + 1) / (M * (M + 1) / 2)
        (g_head,) = torch.autograd.grad(ce, hidden)
        entering = g_head if later is None else (g_head + (M - i - 1) * later) / (M - i)
        layer = list(model.backbone[i].parameters())
        *own, later = torch.autograd.grad(after[i], [*layer, before[i]], entering)
        expected.update(zip(layer, own, strict=True))
    for got, parameter in zip(gradients(model, inputs, labels), model.parameters(), strict=True):
        assert_close(got, expected[parameter])  # heads and pooler: the plain gradient, whole


def test_two_exits_by_hand():
    """x -> a x -> b a x, identity heads, at regression with labels 0: L = (1 (ax)^2 + 2 (bax)^2) / 3.

    M = 2. Entering layer 1 (i = 1): g = dL/dh_2 = 4/3 h_2; so dL/db = g h_1 = 4/3 b a^2 x^2.
    Entering layer 0: [g_head + (2 - 0 - 1) g_later] / 2 = [2/3 h_1 + 4/3 h_2 b] / 2; times x for a.
    """

    class Chain(torch.nn.Module):
        num_exits = 2

        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.tensor([[2.0]]), torch.tensor([[3.0]])])

        def start(self, inputs):
            return inputs

        def layers(self, hidden, exit):
            return hidden @ self.weights[exit - 1]

        def classify(self, hidden, exit):
            return hidden

    first, second = gradients(Chain(), torch.tensor([[5.0]]), torch.tensor([0.0]))
    h1, h2 = 10.0, 30.0
    assert_close(second, torch.tensor([[4 / 3 * h2 * h1]]))
    assert_close(first, torch.tensor([[(2 / 3 * h1 + 4 / 3 * h2 * 3.0) / 2 * 5.0]]))


def test_logits_are_the_networks_own():
    torch.manual_seed(0)
    model = MultiExitResNet(depth=8, in_channels=1).eval()
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(STAGE.forward(model, images, Settings()), model(images))
    assert repr(STAGE.rule(Settings())) == "Sum()"


def test_a_frozen_backbone_is_no_obstacle():
    model, (inputs, labels) = small(), batch()
    model.backbone.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = STAGE.objective(Step(STAGE.forward(model, inputs, Settings()), labels))["ce"]
    plain = objectives.weighted_cross_entropy(model(**inputs), labels)
    for one, two in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(plain, trained), strict=True):
        assert_close(one, two)
