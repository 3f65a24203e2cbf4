from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gradalign import GradientAligner
from gradalign.multiexit import methods
from gradalign.multiexit.methods import Settings, Step
from tests.multiexit.methods.small import batch, random_logits, small

PAIRS = ["pml-joint", "pml-kd-early", "pml-kd-late", "pml-mutual"]
LABELS = torch.arange(5) % 4


def gradients(name, settings, num_exits=4):
    """The gradient of each parameter after one aligned backward, by name."""
    model, (inputs, labels) = small(num_exits), batch()
    (stage,) = methods.get(name).stages
    optimizer = GradientAligner(torch.optim.SGD(model.parameters()), stage.rule(settings))
    optimizer.backward(stage.objective(Step(stage.forward(model, inputs, settings), labels, settings)))
    return {name: p.grad for name, p in model.named_parameters()}


def reached(name, settings):
    return {part for part, gradient in gradients(name, settings).items() if gradient is not None}


def test_direct_cuts_the_network_off():
    trained = reached("pml-direct", Settings(pair_exit=2))
    assert {part.split(".")[0] + part.split(".")[1] for part in trained if not part.startswith("pooler")} == {
        "backbone0", "backbone1", "heads1",
    }  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_only_the_two_heads_train(name):
    trained = reached(name, Settings(pair_exit=2))
    assert {part.split(".")[1] for part in trained if part.startswith("heads")} == {"1", "3"}
    assert {part.split(".")[1] for part in trained if part.startswith("backbone")} == {"0", "1", "2", "3"}


def test_only_what_is_needed_is_run():
    model, (inputs, _) = small(4), batch()
    run = []
    for name, module in model.named_modules():
        if name.count(".") == 1:
            module.register_forward_hook(lambda *_, name=name: run.append(name))
    methods.get("pml-direct").stages[0].forward(model, inputs, Settings(pair_exit=2))
    assert run == ["backbone.0", "backbone.1", "heads.1"]
    run.clear()
    logits = methods.get("pml-joint").stages[0].forward(model, inputs, Settings(pair_exit=2))
    assert run == ["backbone.0", "backbone.1", "heads.1", "backbone.2", "backbone.3", "heads.3"]
    assert_close(logits, model(**inputs)[[1, 3]])


def kl(teacher, student, T):
    return T**2 * F.kl_div((student / T).log_softmax(-1), (teacher.detach() / T).softmax(-1), reduction="batchmean")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", PAIRS)
def test_losses(name, reduction):
    logits = random_logits(2).requires_grad_()
    early, late = logits
    losses = methods.get(name).stages[0].objective(Step(logits, LABELS, Settings(temperature=2.0, reduction=reduction)))
    assert_close(losses["ce"], F.cross_entropy(early, LABELS) + F.cross_entropy(late, LABELS))
    taught = {
        "pml-joint": None,
        "pml-kd-early": kl(late, early, 2.0),
        "pml-kd-late": kl(early, late, 2.0),
        "pml-mutual": kl(late, early, 2.0) + kl(early, late, 2.0),
    }[name]
    assert set(losses) == ({"ce"} if taught is None else {"ce", "kd"})
    if taught is not None:
        assert_close(losses["kd"], taught)
        (gradient,), (expected,) = (torch.autograd.grad(loss, logits) for loss in (losses["kd"], taught))
        assert_close(gradient, expected)


def test_rules_and_judges():
    stages = {name: methods.get(name).stages[0] for name in ["pml-direct", *PAIRS]}
    assert {name: stage.judged for name, stage in stages.items()} == {
        "pml-direct": "early", **dict.fromkeys(PAIRS, "pair")
    }  # fmt: skip
    rules = {name: repr(stage.rule(Settings(alpha=0.2))) for name, stage in stages.items()}
    assert rules == {"pml-direct": "Sum()", "pml-joint": "Sum()"} | dict.fromkeys(
        PAIRS[1:], "Constant(weights=(0.8, 0.2))"
    )


@pytest.mark.parametrize("name", ["pml-direct", *PAIRS])
def test_regression(name):
    logits, labels = random_logits(1 if name == "pml-direct" else 2, classes=1), torch.randn(5, dtype=torch.float64)
    losses = methods.get(name).stages[0].objective(Step(logits, labels, Settings(reduction="sum")))
    assert_close(losses["ce"], sum((exit[:, 0] - labels).square().mean() for exit in logits))
    if "kd" in losses:
        both = 2 if name == "pml-mutual" else 1
        assert_close(losses["kd"], both * (logits[0] - logits[1]).square().mean())


def test_exits_that_are_none():
    model, (inputs, _) = small(3), batch()
    for name, exit, message in (
        ("pml-direct", 4, r"`pair_exit` must be in 1\.\.3, the number of exits, got 4"),
        ("pml-joint", 3, "`pair_exit` must be an exit before the last, 3, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.get(name).stages[0].forward(model, inputs, Settings(pair_exit=exit))
    assert methods.get("pml-direct").stages[0].forward(model, inputs, Settings(pair_exit=3)).shape == (1, 5, 4)
