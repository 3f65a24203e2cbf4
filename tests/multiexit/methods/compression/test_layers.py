from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from gradalign.multiexit.methods import Settings
from gradalign.multiexit.methods.compression import distillation, layers
from gradalign.multiexit.text import backbones
from gradalign.multiexit.text.heads import KINDS
from tests.multiexit.methods.compression import tiny

FAMILIES = ("bert", "albert", "roberta", "distilbert", "electra")
BATCH, LABELS = tiny.rows(5)


def by_hand(model, kept):
    """The last exit after these layers alone, run one by one."""
    state = model.start(BATCH)
    tokens, cls = state["hidden"], []
    for k in kept:
        tokens = backbones.run(layers.layers_of(model)[k], tokens, backbones.penalty(state["mask"], tokens.dtype))
        cls.append(tokens[:, 0])
    state |= {"hidden": tokens}
    if model.config.exit != "mix":
        return model.classify(state, model.num_exits)
    head = model.heads[-1]  # the mixture of the layers that are kept
    weights = head.mix[list(kept)].softmax(0)
    return head.linear(sum(w * c for w, c in zip(weights, cls, strict=True)))


@pytest.mark.parametrize("kept", [(0, 1), (0, 2), (0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_of_some_layers(family, kept):
    model = tiny.encoder(family).eval()
    before = copy.deepcopy(model.state_dict())
    made = layers.with_layers(model, kept)
    torch.testing.assert_close(made(**BATCH), by_hand(model, kept).unsqueeze(0))
    assert made.exit_layers == (len(kept),)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    if len(kept) == 4:
        torch.testing.assert_close(made(**BATCH)[0], model(**BATCH)[-1])


@pytest.mark.parametrize("exit", KINDS)
def test_the_last_exit_is_kept_whatever_its_kind(exit):
    model = tiny.encoder(exit=exit).eval()
    if exit == "mix":
        torch.nn.init.normal_(model.heads[-1].mix)
    made = layers.with_layers(model, (0, 2))
    assert made.config.exit == exit
    torch.testing.assert_close(made(**BATCH)[0], by_hand(model, (0, 2)))
    logits, _ = distillation.first_tokens(made, BATCH, Settings())
    torch.testing.assert_close(logits, made(**BATCH))


def test_settings_of_the_network_and_the_generator_are_left():
    model = tiny.encoder(num_labels=3, id2label={0: "a", 1: "b", 2: "c"}).double().train()
    model.tokenizer = object()
    state = torch.get_rng_state()
    made = layers.with_layers(model, (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert made.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert made.tokenizer is model.tokenizer
    assert made.training
    assert {p.dtype for p in made.parameters()} == {torch.float64}


@pytest.mark.parametrize(("depth", "half"), [(2, 1), (3, 1), (4, 2), (6, 3)])
def test_the_first_half(depth, half):
    assert list(layers.first_half(tiny.encoder(layers=depth))) == list(range(half))


def test_one_layer_has_no_half():
    with pytest.raises(ValueError, match="`backbone` must have two layers at least, got 1"):
        layers.first_half(tiny.encoder(layers=1))
