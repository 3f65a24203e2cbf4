"""Every method for both kinds on a text encoder: shared pooler, dropout, a hidden state by name, regression."""

from __future__ import annotations

import pytest
import torch

from gradalign import GradientAligner
from gradalign.multiexit import methods
from gradalign.multiexit.methods import Settings, Step
from gradalign.multiexit.methods.networks import frozen_modules

transformers = pytest.importorskip("transformers")
encoder = pytest.importorskip("gradalign.multiexit.text.encoder")

NAMES = [*methods.names("images"), "kd:pcgrad", "exits:mgda"]
BATCH = {"input_ids": torch.arange(4 * 6).view(4, 6) % 32, "attention_mask": torch.ones(4, 6, dtype=torch.long)}


def made(exit="pooler", num_labels=3):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    return encoder.MultiExitEncoder.from_config(config, num_labels=num_labels, exit=exit)


def go(model, stage, labels, steps=2):
    """Train some steps as a run does; return the names of the parameters that changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = list(stage.trains(model))
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = GradientAligner(torch.optim.SGD(trained, lr=0.1), stage.rule(Settings()))
    memory = {}
    for number in range(steps):
        model.train()
        optimizer.zero_grad()
        logits = stage.forward(model, BATCH, Settings())
        optimizer.backward(stage.objective(Step(logits, labels, number=number, epochs=1, memory=memory)))
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("exit", ["pooler", "mix"])
@pytest.mark.parametrize("kind", ["classes", "regression"])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains(name, kind, exit):
    model = made(exit, num_labels=1 if kind == "regression" else 3)
    labels = torch.tensor([0.5, -1.0, 2.0, 0.0]) if kind == "regression" else torch.tensor([0, 1, 2, 0])
    for number, stage in enumerate(methods.get(name).stages):
        changed = go(model, stage, labels)
        assert any(part.startswith("heads.") for part in changed)
        if number == 1:
            assert all(part.startswith(("heads.0.", "heads.1.")) for part in changed)


def test_the_shared_pooler_belongs_to_the_backbone():
    model = made()
    first, second = methods.get("fastbert").stages
    pooler = {id(p) for p in model.pooler.parameters()}
    assert pooler <= {id(p) for p in first.trains(model)}
    assert not pooler & {id(p) for p in second.trains(model)}


def test_an_exits_own_pooler_trains_with_it():
    model = made("deebert")
    _, second = methods.get("deebert").stages
    own = {id(p) for head in model.heads[:-1] for p in head.parameters()}
    assert own == {id(p) for p in second.trains(model)}


def test_dropout_is_active_where_the_network_trains_and_only_there():
    model = made()
    assert frozen_modules(model) == []
    model.requires_grad_(False)
    model.heads[0].requires_grad_(True)
    frozen = {id(module) for module in frozen_modules(model)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            assert (id(module) in frozen) == (not name.startswith("heads.0"))


@pytest.mark.parametrize("exit", ["pooler", "mix"])
def test_gradient_equilibrium_leaves_the_logits(exit):
    model = made(exit).eval()
    (stage,) = methods.get("gradient-equilibrium").stages
    assert torch.equal(stage.forward(model, BATCH, Settings()), model(**BATCH))
