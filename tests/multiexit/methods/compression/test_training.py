"""The compression baselines through training: stages, interrupts, and the network that is kept."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from gradalign.multiexit import methods
from gradalign.multiexit.configs import ImageConfig
from gradalign.multiexit.methods import compression
from gradalign.multiexit.runs import Run
from gradalign.multiexit.training import Interrupted, train
from tests.multiexit.methods.compression import tiny
from tests.multiexit.spies import interrupting

NAMES = [method.name for method in compression.METHODS]
DEPTHS = dict.fromkeys(NAMES, 2) | {"head-pruning": 4}
STAGES = {name: len(methods.get(name).stages) for name in NAMES}
AN_EPOCH = tiny.AN_EPOCH


def test_the_names():
    assert NAMES == ["bert-6l", "distilbert", "bert-pkd", "layerdrop", "theseus", "head-pruning"]
    assert set(NAMES) <= set(methods.names("text"))
    assert not set(NAMES) & set(methods.names("images"))
    with pytest.raises(ValueError, match="`method` must be one for images, got 'theseus', which is for text"):
        ImageConfig(method="theseus")


def test_the_table_needs_no_transformers():
    code = "import sys, gradalign.multiexit.methods; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_network_that_is_kept(name, tmp_path):
    run, work = tiny.trained(tmp_path / "run", name)
    model = work.load(run.folder)
    assert model.num_exits == 1
    assert model.exit_layers == (DEPTHS[name],)
    assert run.result["depth"] == DEPTHS[name]
    assert run.result["whole_depth"] == 4
    assert len(model.backbone.encoder.layer) == DEPTHS[name]
    plain = tiny.encoder(layers=DEPTHS[name], exits=[])
    assert model.state_dict().keys() == plain.state_dict().keys()
    for split in ("held_out", "test"):
        assert torch.equal(run.logits(split)[0], work.logits(model, split)[0])
    assert run.result["stages"] == [2 * AN_EPOCH] * STAGES[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_learns(name, tmp_path):
    run, _ = tiny.trained(tmp_path / "run", name, epochs=25, learning_rate=3e-3)
    for number in range(STAGES[name]):
        losses = [step["losses"]["ce"] for step in run.metrics("step") if step["stage"] == number + 1]
        assert sum(losses[-6:]) < 0.9 * sum(losses[:6]) or sum(losses[:6]) < 0.3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patience", [None, 1])
def test_interrupts_in_each_stage_change_no_bit(name, patience, tmp_path, monkeypatch):
    whole, _ = tiny.trained(tmp_path / "whole", name, patience=patience)
    run = Run.create(tmp_path / "stopped", whole.config)
    first = whole.result["stages"][0]
    steps = [1, first - 1] + ([first, first + 2] if STAGES[name] == 2 else [])
    interrupting(monkeypatch, steps)
    for done in steps:
        with pytest.raises(Interrupted, match=f"stopped after step {done + 1}"):
            train(run, tiny.Tokens(run.config))
    train(run, tiny.Tokens(run.config))
    for file in ("model/model.safetensors", "metrics.jsonl", "logits.safetensors"):
        assert (whole.folder / file).read_bytes() == (run.folder / file).read_bytes()


@pytest.mark.parametrize("name", ["distilbert", "bert-pkd"])
def test_the_teacher_is_the_fine_tuned_encoder(name, tmp_path, monkeypatch):
    seen = tiny.states(monkeypatch)
    tiny.trained(tmp_path / "run", name)
    (start, trains, none), (_, _, teacher) = seen
    assert none is None
    assert trains == set(start) - {key for key in start if "position_ids" in key}
    assert teacher.exit_layers == (4,)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    new = tiny.encoder().state_dict()
    tuned = teacher.state_dict()
    assert all(torch.equal(start[key], new[key.replace("heads.0.", "heads.3.")]) for key in start)
    assert not any(torch.equal(start[key], tuned[key]) for key in trains if key.endswith("weight"))


def test_no_teacher_is_kept_where_none_is_asked(tmp_path, monkeypatch):
    seen = tiny.states(monkeypatch)
    run, _ = tiny.trained(tmp_path / "run", "theseus")
    assert [teacher for *_, teacher in seen] == [None, None]
    assert run.load_checkpoint()["teacher"] is None
