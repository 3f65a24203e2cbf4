from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("transformers")

from gradalign.multiexit import methods
from gradalign.multiexit.methods import Settings, Step
from gradalign.multiexit.methods.compression import distillation, layers
from tests.multiexit.methods.compression import tiny

BATCH, LABELS = tiny.rows(5)


def pair(depth=6):
    teacher = layers.with_layers(tiny.encoder(layers=depth), range(depth)).eval()
    student = distillation.every_other_layer(teacher, Settings())
    return teacher, student


def step_of(teacher, student, settings):
    logits, states = distillation.first_tokens(student, BATCH, settings)
    return Step(logits, LABELS, settings, model=student, inputs=BATCH, teacher=teacher, states=states)


def kl(teacher, student, T):
    """T^2 KL written out, mean over the rows."""
    p, q = F.softmax(teacher / T, -1), F.softmax(student / T, -1)
    return T**2 * (p * (p / q).log()).sum(-1).mean()


def test_distilberts_losses():
    teacher, student = pair()
    losses = distillation.taught(step_of(teacher, student, Settings(temperature=2.0)))
    logits, wanted = student(**BATCH)[0], teacher(**BATCH)[0]
    assert_close(losses["ce"], F.cross_entropy(logits, LABELS))
    assert_close(losses["kd"], kl(wanted, logits, 2.0))


def test_patience_pairs_student_layers_with_every_other_one_of_the_teacher():
    teacher, student = pair()
    losses = distillation.patiently_taught(step_of(teacher, student, Settings(temperature=5.0)))
    whole = tiny.encoder(layers=6).eval()
    half = layers.layers_of(student)

    def tokens(network, modules):
        state = network.start(BATCH)
        out, mask = [state["hidden"]], (1 - BATCH["attention_mask"].float())[:, None, None] * torch.finfo().min
        for module in modules:
            after = module(out[-1], mask)
            out.append(after[0] if isinstance(after, tuple) else after)
        return [hidden[:, 0] / hidden[:, 0].norm(dim=-1, keepdim=True) for hidden in out]

    above, below = tokens(whole, layers.layers_of(whole)), tokens(student, half)
    # of six layers: student layers 1, 2 learn from teacher layers 2, 4
    expected = sum((below[k] - above[2 * k]).square().mean() for k in (1, 2)) / 2
    assert_close(losses["patience"], expected)
    assert_close(losses["kd"], kl(teacher(**BATCH)[0], student(**BATCH)[0], 5.0))
    assert losses["patience"] > 1e-4


def test_nothing_of_the_teacher_learns():
    teacher, student = pair()
    losses = distillation.patiently_taught(step_of(teacher, student, Settings()))
    sum(losses.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert layers.layers_of(student)[0].attention.output.dense.weight.grad.norm() > 0


def test_the_weights_and_defaults():
    distilbert, pkd = methods.get("distilbert"), methods.get("bert-pkd")
    assert distilbert.stages[1].rule(distilbert.defaults).weights == (0.5, 0.5)
    assert distilbert.defaults.temperature == 2.0
    assert pkd.stages[1].rule(Settings(alpha=0.2, beta=500.0)).weights == (0.8, 0.2, 500.0)
    assert tiny.config("bert-pkd").beta == 100.0
    assert tiny.config("bert-pkd", beta=10.0).settings.beta == 10.0
    for wrong in (-1.0, math.inf):
        with pytest.raises(ValueError, match="`beta` must be finite and at least 0"):
            tiny.config("bert-pkd", beta=wrong)


@pytest.mark.parametrize(("name", "kept", "tuned"), [("distilbert", (0, 2), True), ("bert-pkd", (0, 1), False)])
def test_what_the_student_begins_as(name, kept, tuned, tmp_path, monkeypatch):
    seen = tiny.states(monkeypatch)
    tiny.trained(tmp_path / "run", name)
    student, trains, teacher = seen[1]
    source = teacher if tuned else tiny.encoder()
    expected = layers.with_layers(source, kept).state_dict()
    assert student.keys() == expected.keys()
    assert all(torch.equal(student[key], expected[key]) for key in student)
    assert trains == {n for n, _ in layers.with_layers(source, kept).named_parameters()}


def test_six_layers_on_labels_begins_as_the_first_half(tmp_path, monkeypatch):
    seen = tiny.states(monkeypatch)
    tiny.trained(tmp_path / "run", "bert-6l")
    ((student, _, _),) = seen
    expected = layers.with_layers(tiny.encoder(), (0, 1)).state_dict()
    assert all(torch.equal(student[key], expected[key]) for key in expected)


def test_patience_needs_a_layer_before_the_last():
    teacher, student = pair(depth=2)
    with pytest.raises(ValueError, match="`backbone` must have four layers at least for bert-pkd, got a student of 1"):
        distillation.patiently_taught(step_of(teacher, student, Settings()))
