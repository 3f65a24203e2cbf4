from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from gradalign.multiexit.methods import Settings
from gradalign.multiexit.methods.compression import layers, theseus
from gradalign.multiexit.runs import Run
from gradalign.multiexit.text import backbones
from gradalign.multiexit.training import train
from tests.multiexit.methods.compression import tiny

BATCH, LABELS = tiny.rows(5)


def replaced():
    """Predecessor and network, neither with dropout: in training mode the coins alone are drawn."""
    predecessor = layers.whole(tiny.encoder(), Settings()).eval()
    model = theseus.with_successors(predecessor, Settings())
    for layer in layers.layers_of(model):
        layer.training = True
        with torch.no_grad():
            for parameter in layer.successor.parameters():
                parameter.add_(0.1)
    return predecessor, model


def coins(seed):
    torch.manual_seed(seed)
    return torch.stack([torch.rand(()) for _ in range(2)])


def test_successors_begin_as_the_first_half():
    predecessor = tiny.encoder()
    model = theseus.with_successors(predecessor, Settings())
    old = layers.layers_of(predecessor)
    for k, layer in enumerate(layers.layers_of(model)):
        assert list(layer.predecessors) == old[2 * k : 2 * k + 2]
        copied = old[k].state_dict()
        assert all(torch.equal(value, copied[name]) for name, value in layer.successor.state_dict().items())
        assert layer.successor is not old[k]


def test_each_coin_replaces_two_layers_by_one():
    predecessor, model = replaced()
    old, new = layers.layers_of(predecessor), [layer.successor for layer in layers.layers_of(model)]
    seen = set()
    for seed in range(10):
        model.steps.zero_()
        drawn = tuple((coins(seed) < 0.3).tolist())
        torch.manual_seed(seed)
        logits = theseus.replacing(model, BATCH, Settings())
        run = [m for k, coin in enumerate(drawn) for m in ([new[k]] if coin else old[2 * k : 2 * k + 2])]
        state = predecessor.start(BATCH)
        hidden = state["hidden"]
        for layer in run:
            hidden = backbones.run(layer, hidden, backbones.penalty(state["mask"], hidden.dtype))
        expected = predecessor.classify({**state, "hidden": hidden}, 1)
        torch.testing.assert_close(logits[0], expected)
        seen.add(drawn)
    assert len(seen) > 2


def test_the_probability_grows_with_the_step():
    _, model = replaced()
    for step, expected in ((0, 0.3), (1, 0.3006), (1000, 0.9), (1166, 0.9996), (1167, 1.0), (5000, 1.0)):
        model.steps.fill_(step)
        theseus.replacing(model, BATCH, Settings())
        assert all(layer.probability == pytest.approx(expected) for layer in layers.layers_of(model))
        assert model.steps == step + 1


def test_evaluation_is_of_the_successors():
    predecessor, model = replaced()
    kept = theseus.successors_alone(model, tiny.Tokens(tiny.config("theseus")))
    model.eval()
    assert torch.equal(model(**BATCH), kept.eval()(**BATCH))
    assert not torch.allclose(model(**BATCH), predecessor(**BATCH))


def test_a_step_without_any_successor_has_a_gradient_of_zero():
    _, model = replaced()
    model.requires_grad_(False)
    trained = theseus.successors(model)
    for parameter in trained:
        parameter.requires_grad_(True)
    seed = next(seed for seed in range(99) if coins(seed).min() >= 0.3)
    torch.manual_seed(seed)
    theseus.replacing(model, BATCH, Settings()).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trained)


def test_only_successors_train(tmp_path, monkeypatch):
    seen = tiny.states(monkeypatch)
    run, work = tiny.trained(tmp_path / "run", "theseus", epochs=4)
    start, trains, _ = seen[1]
    assert trains == {key for key in start if ".successor." in key}
    kept = work.load(run.folder).state_dict()
    for key, value in kept.items():
        old = key.replace("encoder.layer.0.", "encoder.layer.0.successor.")
        old = old.replace("encoder.layer.1.", "encoder.layer.1.successor.")
        # the keys' bias has no gradient, but for rounding
        assert torch.equal(value, start[old]) != (".layer." in key) or "key.bias" in key
    # and the checkpoint's predecessors
    end = run.load_checkpoint()["model"]
    assert all(torch.equal(end[key], start[key]) for key in set(start) - trains - {"steps"})
    assert end["steps"] == 4 * tiny.AN_EPOCH


def test_an_odd_number_of_layers(tmp_path):
    run = Run.create(tmp_path / "run", tiny.config("theseus"))
    with pytest.raises(ValueError, match="`backbone` must have an even number of layers for theseus, got 3"):
        train(run, tiny.Tokens(run.config, layers=3))


@pytest.mark.parametrize("family", ["albert", "roberta", "distilbert", "electra"])
def test_every_family(family, tmp_path):
    run, work = tiny.trained(tmp_path / "run", "theseus", lambda config: tiny.Tokens(config, family=family))
    model = work.load(run.folder)
    assert model.exit_layers == (2,)
    assert torch.equal(run.logits("test")[0], work.logits(model, "test")[0])
