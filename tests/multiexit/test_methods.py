from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gradalign import GradientAligner
from gradalign.multiexit import MultiExitResNet, methods, objectives
from gradalign.multiexit.methods import Settings, Step


def test_the_table():
    assert methods.names() == ["joint", "ml", "gaml-soft", "gaml-hard"]
    with pytest.raises(ValueError, match=r"`method` must be one of .* got 'gaml_soft'; did you mean 'gaml-soft'"):
        methods.get("gaml_soft")


@pytest.mark.parametrize("name", methods.names())
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
    shown = {name: repr(methods.get(name).stages[0].rule(settings)) for name in methods.names()}
    assert shown == {
        "joint": "Sum()",
        "ml": "Constant(weights=(0.8, 0.2))",
        "gaml-soft": "GASoft(anchor='ce', alpha=0.2, clamp=False)",
        "gaml-hard": "GAHard(anchor='ce', alpha=0.2, full_step=True)",
    }
