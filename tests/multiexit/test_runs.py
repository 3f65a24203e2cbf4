from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from gradalign.multiexit.configs import ImageConfig
from gradalign.multiexit.files import plain
from gradalign.multiexit.runs import Run

SMALL = ImageConfig(depth=8, exits=(1, 2), epochs=1)


def test_a_configuration_comes_back_from_its_folder(tmp_path):
    config = replace(SMALL, method="ml", learning_rate=0.05, alpha=0.2, granularity="layer")
    Run.create(tmp_path / "run", config)
    assert Run.open(tmp_path / "run").config == config


BAD = {
    "method": ("gaml", r"`method` must be one of .*, got 'gaml'"),
    "depth": (10, r"`depth` must be 6n \+ 2"),
    "epochs": (0, r"`epochs` must be at least 1, got 0"),
    "batch_size": (-1, r"`batch_size` must be at least 1, got -1"),
    "exits": ("blocks", r"`exits` must be one of 'block', 'shallow-deep', got 'blocks'; did you mean 'block'"),
    "learning_rate": (-0.1, r"`learning_rate` must be finite and at least 0, got -0.1"),
    "momentum": (1.5, r"`momentum` must be in \[0, 1\], got 1.5"),
    "alpha": (2.0, r"`alpha` must be in \[0, 1\], got 2.0"),
    "temperature": (0.0, r"`temperature` must be positive, got 0.0"),
    "seed": (2**70, r"`seed` must be in \[0, 2\*\*63\), got"),
    "reduction": ("total", r"`reduction` must be one of 'sum', 'mean', got 'total'"),
    "granularity": ("block", r"`granularity` must be one of 'global', 'layer', 'tensor', got 'block'"),
}


@pytest.mark.parametrize("field", BAD)
def test_a_setting_that_makes_no_sense_is_named(field):
    value, message = BAD[field]
    with pytest.raises(ValueError, match=message):
        ImageConfig(**{field: value})


def test_initial_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    one, two, other = SMALL.make_model(10, 1), SMALL.make_model(10, 1), replace(SMALL, seed=1).make_model(10, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.stem[0].weight, two.stem[0].weight)
    assert not torch.equal(one.stem[0].weight, other.stem[0].weight)


def test_a_folder_with_a_run_is_left_as_it_is(tmp_path):
    Run.create(tmp_path, SMALL)
    with pytest.raises(
        FileExistsError, match=r"`out` must be a folder without a run, got .*; continue it with --resume"
    ):
        Run.create(tmp_path, replace(SMALL, seed=9))
    assert Run.open(tmp_path).config.seed == 0


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`run` must be the folder of a run, got .* which has no config.json"):
        Run.open(tmp_path)


def test_a_folder_of_runs(tmp_path):
    Run.create(tmp_path / "ml-seed0", SMALL)
    with pytest.raises(FileNotFoundError, match=r"`run` must be the folder of one run, .* holds ml-seed0; name one"):
        Run.open(tmp_path)


def test_a_run_that_is_not_finished(tmp_path):
    run = Run.create(tmp_path, SMALL)
    with pytest.raises(FileNotFoundError, match=r"`run` must be finished, got .*; `gradalign train --resume"):
        _ = run.result
    with pytest.raises(FileNotFoundError, match=r"`run` must be finished"):
        run.logits("test")
    assert run.load_checkpoint() is None


def test_a_spoiled_configuration_is_named(tmp_path):
    Run.create(tmp_path, SMALL)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "nonsense": 1}))
    with pytest.raises(ValueError, match=r"`config` must hold .* that differs in \['nonsense'\]"):
        _ = Run.open(tmp_path).config
    path.write_text("{")
    with pytest.raises(ValueError, match=r"`config.json` must be JSON, got"):
        _ = Run.open(tmp_path).config


def test_logits_come_back(tmp_path):
    run = Run.create(tmp_path, SMALL)
    logits = {"held_out": (torch.randn(3, 4, 2), torch.arange(4)), "test": (torch.randn(3, 1, 2), torch.tensor([1.5]))}
    run.save_logits(logits)
    run.save_result({})
    for split, (scores, labels) in logits.items():
        assert torch.equal(run.logits(split)[0], scores)
        assert torch.equal(run.logits(split)[1], labels)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    run = Run.create(tmp_path, SMALL)
    run.save_checkpoint({"step": 1})
    with pytest.raises((AttributeError, TypeError, RuntimeError), match="pickle"):
        run.save_checkpoint({"step": lambda: 2})
    assert run.load_checkpoint() == {"step": 1}


def test_metrics_beyond_the_checkpoint_are_dropped(tmp_path):
    run = Run.create(tmp_path, SMALL)
    with run.open_metrics(0) as file:
        file.write(b'{"kind": "step", "step": 1}\n')
        size = file.tell()
        file.write(b'{"kind": "step", "step": 2}\n')
    with run.open_metrics(size) as file:
        file.write(b'{"kind": "epoch", "epoch": 1}\n')
    assert list(run.metrics("step")) == [{"kind": "step", "step": 1}]
    assert list(run.metrics("epoch")) == [{"kind": "epoch", "epoch": 1}]


def test_plain_values():
    value = {"a": torch.tensor([1.0, torch.nan]), "b": (1, "x", float("inf")), 3: None}
    assert plain(value) == {"a": [1.0, None], "b": [1, "x", None], "3": None}
