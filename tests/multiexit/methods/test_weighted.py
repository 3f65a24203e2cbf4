from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gradalign.multiexit import methods
from gradalign.multiexit.methods import Settings, Step
from tests.multiexit.methods.small import random_logits

LABELS = torch.arange(5) % 4


@pytest.mark.parametrize("epoch", [1, 50, 99, 100])
def test_shallow_deep_weights_grow_with_the_epochs(epoch):
    logits = random_logits(7)
    cross = [F.cross_entropy(exit, LABELS) for exit in logits]
    expected = cross[-1]
    for C, loss in zip((0.15, 0.30, 0.45, 0.60, 0.75, 0.90), cross, strict=False):
        expected = expected + min(C, 0.01 + epoch * C / 100) * loss
    (stage,) = methods.get("shallow-deep").stages
    losses = stage.objective(Step(logits, LABELS, epoch=epoch, epochs=100))
    assert set(losses) == {"ce"}
    assert_close(losses["ce"], expected)
    assert repr(stage.rule(Settings())) == "Sum()"


def test_shallow_deep_costs_are_linear_for_other_depths():
    # M = 3: C = .45, .90. At the last epoch c_i = C_i.
    logits = random_logits()
    cross = [F.cross_entropy(exit, LABELS) for exit in logits]
    losses = methods.get("shallow-deep").stages[0].objective(Step(logits, LABELS, epoch=5, epochs=5))
    assert_close(losses["ce"], 0.45 * cross[0] + 0.9 * cross[1] + cross[2])


def test_berxit_takes_turns():
    logits = random_logits()
    cross = [F.cross_entropy(exit, LABELS) for exit in logits]
    (stage,) = methods.get("berxit").stages
    for number in range(4):
        losses = stage.objective(Step(logits, LABELS, number=number))
        assert set(losses) == {"ce"}
        assert_close(losses["ce"], cross[2] if number in (0, 2) else sum(cross))


@pytest.mark.parametrize("name", ["shallow-deep", "berxit"])
def test_regression(name):
    logits, labels = random_logits(classes=1), torch.randn(5, dtype=torch.float64)
    errors = [(exit[:, 0] - labels).square().mean() for exit in logits]
    losses = methods.get(name).stages[0].objective(Step(logits, labels, number=1))
    assert_close(losses["ce"], sum(errors) if name == "berxit" else 0.45 * errors[0] + 0.9 * errors[1] + errors[2])
