from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gradalign import GradientAligner
from gradalign.multiexit import MultiExitResNet, methods, objectives
from gradalign.multiexit.methods import Settings, Step

NAMES = ["joint", "ml", "gaml-soft", "gaml-hard"]


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_papers(name):
    logits, labels = torch.randn(3, 5, 4), torch.arange(5) % 4
    settings = Settings(alpha=0.2, temperature=2.0, reduction="sum")
    losses = methods.get(name).stages[0].objective(Step(logits, labels, settings))
    assert_close(losses["ce"], objectives.weighted_cross_entropy(logits, labels))
    if name == "joint":
        assert set(losses) == {"ce"}
    else:
        assert list(losses) == ["ce", "kd"]
        assert_close(losses["kd"], objectives.mutual_distillation(logits, 2.0, "sum"))


def test_mutual_learning_is_the_weighted_sum_of_eq_2():
    def gradients(step):
        torch.manual_seed(0)
        model = MultiExitResNet(depth=8, in_channels=1)
        inputs, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
        losses = methods.get("ml").stages[0].objective(Step(model(inputs), labels, Settings(alpha=0.2)))
        step(model, losses)
        return [p.grad for p in model.parameters()]

    def aligned(model, losses):
        rule = methods.get("ml").stages[0].rule(Settings(alpha=0.2))
        GradientAligner(torch.optim.SGD(model.parameters()), rule).backward(losses)

    def plain(model, losses):
        (0.8 * losses["ce"] + 0.2 * losses["kd"]).backward()

    for one, two in zip(gradients(aligned), gradients(plain), strict=True):
        assert_close(one, two)


def test_rules():
    settings = Settings(alpha=0.2)
    shown = {name: repr(methods.get(name).stages[0].rule(settings)) for name in NAMES}
    assert shown == {
        "joint": "Sum()",
        "ml": "Constant(weights=(0.8, 0.2))",
        "gaml-soft": "GASoft(anchor='ce', alpha=0.2, clamp=False)",
        "gaml-hard": "GAHard(anchor='ce', alpha=0.2, full_step=True)",
    }


def test_options_of_the_rules():
    settings = Settings(alpha=0.2, clamp=True, full_step=False)
    soft, hard = (methods.get(name).stages[0].rule(settings) for name in ("gaml-soft", "gaml-hard"))
    assert repr(soft) == "GASoft(anchor='ce', alpha=0.2, clamp=True)"
    assert repr(hard) == "GAHard(anchor='ce', alpha=0.2, full_step=False)"


@pytest.mark.parametrize("name", NAMES)
def test_regression(name):
    logits, labels = torch.randn(3, 5, 1, dtype=torch.float64), torch.randn(5)
    losses = methods.get(name).stages[0].objective(Step(logits, labels, Settings(reduction="sum")))
    errors = [(logits[m, :, 0] - labels).square().mean() for m in range(3)]
    assert_close(losses["ce"], (1 * errors[0] + 2 * errors[1] + 3 * errors[2]) / 6)
    if name != "joint":
        pairs = [(logits[i] - logits[j]).square().mean() for i in range(3) for j in range(3) if i != j]
        assert_close(losses["kd"], sum(pairs))
