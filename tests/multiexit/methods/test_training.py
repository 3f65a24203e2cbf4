"""Methods in training: through their stages, through early stop, and through interrupts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from gradalign import cli
from gradalign.multiexit import data, methods, training
from gradalign.multiexit.configs import ImageConfig
from gradalign.multiexit.data import Split
from gradalign.multiexit.images import ImageWorkload, learning_rate
from gradalign.multiexit.methods.networks import frozen_modules
from gradalign.multiexit.runs import Run
from gradalign.multiexit.training import Interrupted, train
from tests.multiexit.methods.small import small
from tests.multiexit.spies import interrupting, rates_of_sgd, same_files

SMALL = ImageConfig(method="fastbert", depth=8, exits=(1, 2), epochs=1, batch_size=32, learning_rate=0.005)
AN_EPOCH = 6
ROWS = AN_EPOCH * 32
TWO_STAGES = ["fastbert", "deebert", "shallow-deep-frozen"]


@pytest.fixture(scope="module")
def digits():
    """A part of the digits: tests train on it in seconds."""
    whole = data.load("digits")
    few = [Split(part.images[:ROWS], part.labels[:ROWS]) for part in (whole.train, whole.held_out, whole.test)]
    return replace(whole, train=few[0], held_out=few[1], test=few[2])


def work(config, images):
    return ImageWorkload(config, torch.device("cpu"), images)


def trained(folder, digits, **changed):
    config = replace(SMALL, alpha=None, **changed)
    run = Run.create(folder, config)
    train(run, work(config, digits))
    return run


def state_of(model):
    return copy.deepcopy(model.state_dict())


@pytest.fixture
def boundaries(monkeypatch):
    """The network's state as each stage begins."""
    states = []
    enter = training._Training._enter

    def entering(self, *arguments):
        enter(self, *arguments)
        states.append(state_of(self.model))

    monkeypatch.setattr(training._Training, "_enter", entering)
    return states


@pytest.mark.parametrize("method", [*methods.names("images"), "kd:graddrop", "exits:upgrad"])
def test_every_method_learns(method, digits, tmp_path):
    rate = 0.005 if method == "fastbert" else 0.05  # ten times that in the second stage
    run = trained(tmp_path / "run", digits, method=method, epochs=8, learning_rate=rate)
    accuracies = run.result["test_accuracy"]
    judged = methods.get(method).stages[-1].judged
    for exit in {"mean": (0, 1, 2), "early": (0,), "pair": (0, 2), "last": (2,)}[judged]:
        assert accuracies[exit] > 0.4  # chance is 0.1
    for number in range(len(run.result["stages"])):
        steps = [step for step in run.metrics("step") if step["stage"] == number + 1]
        first, last = (sum(next(iter(step["losses"].values())) for step in part) for part in (steps[:4], steps[-4:]))
        assert last < first or method in ("shallow-deep", "berxit")  # whose losses are other ones at the end


@pytest.mark.parametrize(("method", "epochs"), [("fastbert", 8), ("deebert", 4), ("shallow-deep-frozen", 1)])
def test_the_second_stage_is_as_long_as_its_recipe_says(method, epochs, digits, tmp_path):
    run = trained(tmp_path / "run", digits, method=method, epochs=4, batch_size=96)
    an_epoch = run.result["stages"][0] // 4
    assert run.result["stages"] == [4 * an_epoch, epochs * an_epoch]
    assert run.result["steps"] == sum(run.result["stages"])


@pytest.mark.parametrize("method", TWO_STAGES)
def test_the_second_stage_leaves_the_frozen_network_as_it_was(method, digits, tmp_path, boundaries):
    run = trained(tmp_path / "run", digits, method=method, weight_decay=0.1)
    new, between = boundaries
    end = work(run.config, digits).load(run.folder).state_dict()
    internal = {name for name in end if name.startswith(("heads.0.", "heads.1."))}
    frozen = set(end) - internal
    assert "stem.1.running_mean" in frozen
    assert all(torch.equal(between[name], end[name]) for name in frozen)
    assert all(not torch.equal(between[name], end[name]) for name in internal)
    # and the first stage leaves the internal exits
    assert all(torch.equal(new[name], between[name]) for name in internal)
    assert all(not torch.equal(new[name], between[name]) for name in frozen)


@pytest.mark.parametrize(("method", "factor"), [("fastbert", 10), ("deebert", 1)])
def test_the_learning_rate_of_each_stage(method, factor, digits, tmp_path, monkeypatch):
    rates = rates_of_sgd(monkeypatch)
    run = trained(tmp_path / "run", digits, method=method)
    first, second = run.result["stages"]
    expected = [learning_rate(0.005, 0.1, k, first) for k in range(first)]
    expected += [factor * learning_rate(0.005, 0.1, k, second) for k in range(second)]
    assert rates == pytest.approx(expected)


def test_what_a_step_tells_the_objective(digits, tmp_path, monkeypatch):
    seen = []
    made = training._Training._seen

    def telling(self, *arguments):
        step = made(self, *arguments)
        seen.append((step.number, step.epoch, step.epochs, step.teacher))
        return step

    monkeypatch.setattr(training._Training, "_seen", telling)
    trained(tmp_path / "run", digits, epochs=2)
    assert seen == [(k, k // AN_EPOCH + 1, epochs, None) for epochs in (2, 4) for k in range(epochs * AN_EPOCH)]


@pytest.fixture
def scripted(monkeypatch):
    """Let the scores of the epochs be what a test says, and keep the network's state at each."""
    script, states = [], []
    logits = ImageWorkload.logits

    def seen(self, model, split):
        states.append(state_of(model))
        return logits(self, model, split)

    monkeypatch.setattr(ImageWorkload, "logits", seen)
    monkeypatch.setattr(
        ImageWorkload, "scores", lambda self, *_: {"accuracy": torch.tensor(script.pop(0) if script else [0.0] * 3)}
    )
    return script, states


def test_early_stop_keeps_each_stages_best_network(digits, tmp_path, scripted, boundaries):
    script, states = scripted
    script += [[0.9, 0.9, 0.5], [0.1, 0.1, 0.6], [0.2, 0.2, 0.4], [0.3, 0.3, 0.6]]  # judged by the last exit
    script += [[0.5, 0.5, 0.5], [0.1, 0.1, 0.9], [0.4, 0.5, 0.5]]  # by the mean
    run = trained(tmp_path / "run", digits, epochs=6, patience=2)
    assert run.result["stages"] == [4 * AN_EPOCH, 3 * AN_EPOCH]
    at_second, at_fifth = states[1], states[4]
    assert all(torch.equal(boundaries[1][name], at_second[name]) for name in at_second)
    end = work(run.config, digits).load(run.folder).state_dict()
    assert all(torch.equal(end[name], at_fifth[name]) for name in at_fifth)


@pytest.mark.parametrize(("method", "stop"), [("pml-direct", 2), ("pml-joint", 3)])
def test_early_stop_of_a_pair(method, stop, digits, tmp_path, scripted):
    script, _ = scripted
    script += [[0.9, 0.5, 0.1], [0.1, 0.4, 0.4], [0.3, 0.1, 0.4], [0.5, 0.3, 0.5]]
    run = trained(tmp_path / "run", digits, method=method, pair_exit=2, epochs=4, patience=1)
    # exit 2: .5, .4: stops after 2. Exits 2 and 3: .3, .4, .25: stops after 3.
    assert run.result["stages"] == [stop * AN_EPOCH]


def test_direct_leaves_the_layers_above_as_they_were(digits, tmp_path, boundaries):
    run = trained(tmp_path / "run", digits, method="pml-direct", weight_decay=0.1)
    end = work(run.config, digits).load(run.folder).state_dict()
    above = {name for name in end if name.startswith(("blocks.1.", "blocks.2.", "heads.1.", "heads.2."))}
    for name, value in boundaries[0].items():
        assert torch.equal(value, end[name]) == (name in above)
    assert len(next(run.metrics("step"))["accuracy"]) == 1


@pytest.mark.parametrize("patience", [None, 1])
def test_interrupts_in_each_stage_and_between_them_change_no_bit(patience, digits, tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", digits, patience=patience)
    assert whole.result["stages"][0] == AN_EPOCH
    run = Run.create(tmp_path / "stopped", whole.config)
    steps = (2, AN_EPOCH - 1, AN_EPOCH, AN_EPOCH + 8)
    interrupting(monkeypatch, steps)
    for done in steps:
        with pytest.raises(Interrupted, match=f"stopped after step {done + 1}"):
            train(run, work(run.config, digits))
        assert not run.finished
    train(run, work(run.config, digits))
    assert same_files(whole, run)
    assert run.result["test_accuracy"] == whole.result["test_accuracy"]
    assert run.result["stages"] == whole.result["stages"]


def temperature(run):
    return run.load_checkpoint()["memory"]["temperature"]


def test_dbts_temperature_goes_on_to_the_bit(digits, tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", digits, method="dbt", epochs=12, learning_rate=0.05)
    run = Run.create(tmp_path / "stopped", whole.config)
    interrupting(monkeypatch, [4 * AN_EPOCH + 2])
    with pytest.raises(Interrupted, match="stopped after step"):
        train(run, work(run.config, digits))
    reached = temperature(run)
    assert reached > 1
    train(run, work(run.config, digits))
    assert temperature(run) > reached
    assert same_files(whole, run)


@pytest.mark.parametrize("method", ["berxit", "kd:random-weights"])
def test_turns_and_draws_go_on_to_the_bit(method, digits, tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", digits, method=method)
    run = Run.create(tmp_path / "stopped", whole.config)
    interrupting(monkeypatch, [2])
    with pytest.raises(Interrupted, match="stopped after step"):
        train(run, work(run.config, digits))
    train(run, work(run.config, digits))
    assert same_files(whole, run)


def test_dropout_is_frozen_where_what_it_belongs_to_is():
    model = small(2, dropout=0.5)
    model.norm = nn.BatchNorm1d(6, affine=False)
    assert frozen_modules(model) == []
    model.requires_grad_(False)
    model.heads[0].requires_grad_(True)
    frozen = frozen_modules(model)
    named = {name for name, module in model.named_modules() if any(module is part for part in frozen)}
    assert named == {
        "backbone", "backbone.0", "backbone.0.0", "backbone.0.1", "backbone.0.2", "backbone.1", "backbone.1.0",
        "backbone.1.1", "backbone.1.2", "pooler", "heads.1", "heads.1.0", "heads.1.1",
    }  # fmt: skip


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_blocks_and_scope_where_the_trunk_is_frozen(granularity, digits, tmp_path):
    run = trained(tmp_path / "run", digits, granularity=granularity, scope="trunk")
    assert run.finished


def test_seconds_are_those_of_the_steps(digits, tmp_path, monkeypatch):
    """Judging is no training: a clock that only judging advances stays at zero."""
    clock = [0.0]
    logits = ImageWorkload.logits

    def slow(self, *arguments):
        clock[0] += 100.0
        return logits(self, *arguments)

    monkeypatch.setattr(ImageWorkload, "logits", slow)
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    assert trained(tmp_path / "run", digits, epochs=2).result["seconds"] == 0


@pytest.mark.parametrize("method", ["fastbert", "kd:graddrop", "exits:pcgrad"])
def test_the_command_line(method, tmp_path, capsys):
    command = ["train", "--method", method, "--depth", "8", "--exits", "1,2", "--epochs", "1", "--out"]
    assert cli.main([*command, str(tmp_path / "run")]) == 0
    assert f"{method}: test accuracy of the exits" in capsys.readouterr().out
    pictures = {path.name for path in (tmp_path / "run").glob("*.png")}
    expected = {"fastbert": set(), "kd:graddrop": {"angles.png"}, "exits:pcgrad": {"angles.png", "weights.png"}}
    assert pictures == {"depth-accuracy.png", *expected[method]}


def test_the_command_line_names_what_is_near(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--method", "kd:pc-grad"])
    assert "did you mean 'pcgrad'" in capsys.readouterr().err


def test_options_of_methods_reach_the_run(tmp_path):
    command = ["train", "--method", "pml-joint", "--depth", "8", "--exits", "1,2", "--epochs", "1", "--no-full-step"]
    assert cli.main([*command, "--pair-exit", "2", "--out", str(tmp_path / "run")]) == 0
    config = Run.open(tmp_path / "run").config
    assert (config.pair_exit, config.full_step) == (2, False)
