from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from gradalign.multiexit.methods import Settings
from gradalign.multiexit.methods.compression import layerdrop, layers
from tests.multiexit.methods.compression import tiny

BATCH, _ = tiny.rows(5)
NO_DROPOUT = {"classifier_dropout": 0.0}


def skipping(family="bert"):
    model = layerdrop.skipping(tiny.encoder(family, **NO_DROPOUT), Settings())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
def test_one_coin_a_layer(family):
    model = skipping(family)
    model.config._attn_implementation = "eager"
    for module in model.modules():
        for name in ("attention_dropout", "attention_probs_dropout_prob", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    plain = layers.whole(tiny.encoder(family, **NO_DROPOUT), Settings()).eval()
    outcomes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        kept = tuple(k for k in range(4) if torch.rand(()) >= 0.2)
        torch.manual_seed(seed)
        model.train()
        logits = model(**BATCH)
        if kept:
            torch.testing.assert_close(logits, layers.with_layers(plain, kept)(**BATCH))
        outcomes.add(kept)
    assert len(outcomes) > 3


def test_nothing_is_skipped_in_evaluation():
    model = skipping().eval()
    torch.testing.assert_close(model(**BATCH)[0], tiny.encoder(**NO_DROPOUT).eval()(**BATCH)[-1])


def test_the_rate():
    torch.manual_seed(0)
    layer = layerdrop.Skipped(torch.nn.Bilinear(1, 1, 1)).train()
    hidden, mask = torch.ones(1, 1), torch.ones(1, 1)
    share = sum(layer(hidden, mask) is hidden for _ in range(4000)) / 4000
    assert share == pytest.approx(0.2, abs=0.025)  # four standard deviations


@pytest.mark.parametrize(("depth", "kept"), [(4, (0, 2)), (3, (0, 2)), (5, (0, 2, 4))])
def test_every_other_layer_is_kept(depth, kept):
    plain = tiny.encoder(layers=depth).eval()
    made = layerdrop.pruned(layerdrop.skipping(plain, Settings()), tiny.Tokens(tiny.config("layerdrop")))
    expected = layers.with_layers(plain, kept).state_dict()
    assert made.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in made.state_dict().items())
