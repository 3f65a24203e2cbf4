from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gradalign.multiexit import methods, objectives
from gradalign.multiexit.methods import Settings, Step
from tests.multiexit.methods.small import random_logits

LABELS = torch.arange(5) % 4


def test_fastbert_ga_is_eq_1_and_the_last_exits_teaching():
    (stage,) = methods.get("fastbert-ga").stages
    logits = random_logits().requires_grad_()
    losses = stage.objective(Step(logits, LABELS, Settings(temperature=2.0, reduction="sum")))
    assert list(losses) == ["ce", "kd"]
    assert_close(losses["ce"], objectives.weighted_cross_entropy(logits, LABELS))
    teacher = (logits[-1].detach() / 2).softmax(-1)
    expected = 4 * sum(F.kl_div((logits[m] / 2).log_softmax(-1), teacher, reduction="batchmean") for m in (0, 1))
    assert_close(losses["kd"], expected)
    (gradient,) = torch.autograd.grad(losses["kd"], logits)
    assert not gradient[-1].any()
    mean = stage.objective(Step(logits, LABELS, Settings(temperature=2.0, reduction="mean")))["kd"]
    assert_close(mean, expected / 2)
    assert repr(stage.rule(Settings(alpha=0.2, clamp=True))) == "GASoft(anchor='ce', alpha=0.2, clamp=True)"


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_dbt_is_its_formula(temperature):
    (stage,) = methods.get("dbt").stages
    logits = random_logits().requires_grad_()
    losses = stage.objective(Step(logits, LABELS, Settings(), memory={"temperature": torch.tensor(temperature)}))
    assert_close(losses["ce"], 10 / 3 * sum(F.cross_entropy(logits[m], LABELS) for m in range(3)))
    teacher = (logits[-1].detach() / temperature).softmax(-1)
    H = sum(F.cross_entropy(logits[m] / temperature, teacher) for m in (0, 1))
    assert_close(losses["kd"], 10 / 3 * temperature**2 * H)
    (gradient,) = torch.autograd.grad(losses["kd"], logits)
    assert not gradient[-1].any()
    assert repr(stage.rule(methods.get("dbt").defaults)) == "Constant(weights=(0.5, 0.5))"


def test_dbt_softens_a_sure_teacher():
    (stage,) = methods.get("dbt").stages
    memory = {}
    sure = torch.zeros(2, 1, 2)
    sure[1, 0, 0] = 4.0  # p = 0.982 at T = 1
    stage.objective(Step(sure, LABELS[:1], memory=memory))
    assert_close(memory["temperature"], torch.tensor(1.05))
    stage.objective(Step(sure, LABELS[:1], memory=memory))
    assert_close(memory["temperature"], torch.tensor(1.05**2))
    flat = torch.zeros(2, 1, 3)  # p = 1/3
    stage.objective(Step(flat, LABELS[:1], memory=memory))
    assert_close(memory["temperature"], torch.tensor(1.05**2))


def test_dbt_asks_how_sure_the_softened_teacher_is():
    # Three classes, z = (2, 0, 0): p = e^2 / (e^2 + 2) = .787 at T = 1, but e^(2/4) / (e^(2/4) + 2) = .452 at T = 4.
    assert math.exp(0.5) / (math.exp(0.5) + 2) < 0.5
    (stage,) = methods.get("dbt").stages
    logits = torch.tensor([[[0.0, 0.0, 0.0]], [[2.0, 0.0, 0.0]]])
    memory = {"temperature": torch.tensor(4.0)}
    stage.objective(Step(logits, LABELS[:1], memory=memory))
    assert memory["temperature"] == 4.0


def test_dbt_begins_at_the_settings_temperature():
    (stage,) = methods.get("dbt").stages
    memory = {}
    stage.objective(Step(torch.zeros(2, 1, 3), LABELS[:1], Settings(temperature=2.0), memory=memory))
    assert memory["temperature"] == 2.0


@pytest.mark.parametrize("name", ["fastbert-ga", "dbt"])
def test_regression(name):
    (stage,) = methods.get(name).stages
    logits, labels = random_logits(classes=1), torch.randn(5, dtype=torch.float64)
    losses = stage.objective(Step(logits, labels, Settings(temperature=3.0, reduction="sum")))
    scale = 10 / 3 if name == "dbt" else 1
    errors = [(logits[m, :, 0] - labels).square().mean() for m in range(3)]
    weights = (1, 1, 1) if name == "dbt" else (1 / 6, 2 / 6, 3 / 6)
    assert_close(losses["ce"], scale * sum(w * error for w, error in zip(weights, errors, strict=True)))
    assert_close(losses["kd"], scale * sum((logits[m] - logits[2]).square().mean() for m in (0, 1)))
