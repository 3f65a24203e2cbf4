from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gradalign.multiexit import MultiExitResNet, methods
from gradalign.multiexit.methods import Settings, Step
from tests.multiexit.methods.small import batch, random_logits, small

NAMES = ["fastbert", "deebert", "shallow-deep-frozen"]


def parts(model, stage):
    """The names of the parameters that a stage trains, without what is in a module list."""
    trained = {id(p) for p in stage.trains(model)}
    return {name for name, p in model.named_parameters() if id(p) in trained}


@pytest.mark.parametrize("name", NAMES)
def test_what_trains(name):
    model = small()
    first, second = (parts(model, stage) for stage in methods.get(name).stages)
    internal = {f"heads.{k}.1.{part}" for k in (0, 1) for part in ("weight", "bias")}
    assert second == internal
    assert first == {name for name, _ in model.named_parameters()} - internal  # with the pooler


@pytest.mark.parametrize("name", NAMES)
def test_a_resnets_backbone_is_all_but_its_heads(name):
    model = MultiExitResNet(depth=8)
    first, second = (parts(model, stage) for stage in methods.get(name).stages)
    assert all(part.startswith(("heads.0.", "heads.1.")) for part in second)
    assert first == {name for name, _ in model.named_parameters()} - second


@pytest.mark.parametrize("name", NAMES)
def test_the_first_stage_is_the_last_exits_cross_entropy(name):
    model, (inputs, labels) = small(), batch()
    stage = methods.get(name).stages[0]
    logits = stage.forward(model, inputs, Settings())
    assert_close(logits, model(**inputs)[-1:])
    losses = stage.objective(Step(logits, labels))
    assert set(losses) == {"ce"}
    assert_close(losses["ce"], F.cross_entropy(model(**inputs)[-1], labels))
    assert stage.judged == "last"
    assert (stage.epochs, stage.learning_rate) == (1.0, 1.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fastbert_distils_the_last_exit(temperature):
    stage = methods.get("fastbert").stages[1]
    logits, labels = random_logits().requires_grad_(), torch.arange(5) % 4
    losses = stage.objective(Step(logits, labels, Settings(temperature=temperature)))
    teacher = (logits[-1].detach() / temperature).softmax(-1)
    students = [(logits[m] / temperature).log_softmax(-1) for m in (0, 1)]
    expected = temperature**2 * sum(F.kl_div(student, teacher, reduction="batchmean") for student in students)
    assert set(losses) == {"kd"}
    assert_close(losses["kd"], expected)
    (gradient,) = torch.autograd.grad(losses["kd"], logits)
    assert not gradient[-1].any()
    assert (stage.epochs, stage.learning_rate, stage.judged) == (2.0, 10.0, "mean")
    assert methods.get("fastbert").defaults.temperature == 1.0


@pytest.mark.parametrize(("name", "epochs"), [("deebert", 1.0), ("shallow-deep-frozen", 0.25)])
def test_the_second_stage_is_the_internal_exits_cross_entropy(name, epochs):
    stage = methods.get(name).stages[1]
    logits, labels = random_logits(), torch.arange(5) % 4
    losses = stage.objective(Step(logits, labels))
    assert set(losses) == {"ce"}
    assert_close(losses["ce"], F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels))
    assert (stage.epochs, stage.learning_rate, stage.judged) == (epochs, 1.0, "mean")


def test_regression():
    logits, labels = random_logits(classes=1), torch.randn(5, dtype=torch.float64)
    first, distilled = methods.get("fastbert").stages
    _, supervised = methods.get("deebert").stages
    step = Step(logits, labels, Settings(temperature=3.0))
    assert_close(first.objective(step)["ce"], (logits[2, :, 0] - labels).square().mean())
    assert_close(distilled.objective(step)["kd"], sum((logits[m] - logits[2]).square().mean() for m in (0, 1)))
    assert_close(supervised.objective(step)["ce"], sum((logits[m, :, 0] - labels).square().mean() for m in (0, 1)))


def test_one_exit_leaves_nothing_to_train():
    with pytest.raises(ValueError, match="`exits` must name an exit before the last, got none"):
        methods.get("deebert").stages[1].trains(MultiExitResNet(depth=8, exits=[]))
