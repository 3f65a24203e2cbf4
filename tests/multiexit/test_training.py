from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gradalign import NonFiniteError
from gradalign.multiexit import data, training
from gradalign.multiexit.configs import ImageConfig
from gradalign.multiexit.images import ImageWorkload, learning_rate
from gradalign.multiexit.runs import Run
from gradalign.multiexit.training import Interrupted, train
from tests.multiexit.spies import interrupting, rates_of_sgd, same_files

SMALL = ImageConfig(depth=8, exits=(1, 2), epochs=2, batch_size=64, learning_rate=0.05)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def work(config, images):
    return ImageWorkload(config, torch.device("cpu"), images)


def trained(folder, digits, **changed):
    config = replace(SMALL, **changed)
    run = Run.create(folder, config)
    train(run, work(config, digits))
    return run


@pytest.mark.parametrize("method", ["joint", "ml", "gaml-soft", "gaml-hard"])
def test_methods_learn(method, digits, tmp_path):
    run = trained(tmp_path / method, digits, method=method, epochs=3)
    assert max(run.result["test_accuracy"]) > 0.8
    steps = list(run.metrics("step"))
    assert len(steps) == run.result["steps"] == 3 * 20
    assert sum(steps[-1]["losses"].values()) < sum(steps[0]["losses"].values())


def test_what_a_step_writes(digits, tmp_path):
    run = trained(tmp_path / "run", digits, epochs=1)
    steps = list(run.metrics("step"))
    assert [step["step"] for step in steps] == list(range(1, 21))
    step = steps[5]
    assert step["groups"] == ["ce", "kd"]
    assert set(step["losses"]) == {"ce", "kd"}
    assert len(step["accuracy"]) == 3
    assert len(step["weights"]) == len(step["norms"]) == 2
    assert step["weights"][1] == 0
    assert step["cosines"][0][1] == pytest.approx(step["cosines"][1][0])
    assert step["conflicts"] == ([["ce", "kd"]] if step["cosines"][0][1] < 0 else [])
    assert step["reversals"] == (step["weights"][0] < 0)
    # GA-soft, from what the line itself says: w = (1 - alpha) + alpha |kd| cos / |ce|.
    kd, ce = step["norms"][1], step["norms"][0]
    assert step["weights"][0] == pytest.approx(0.7 + 0.3 * kd * step["cosines"][0][1] / ce)
    (epoch,) = run.metrics("epoch")
    assert epoch["step"] == 20
    assert epoch["held_out_accuracy"] == run.result["held_out_accuracy"]


def test_the_schedule_is_applied(digits, tmp_path, monkeypatch):
    rates = rates_of_sgd(monkeypatch)
    run = trained(tmp_path / "run", digits, epochs=1, warm_up=0.2)
    assert rates == [learning_rate(0.05, 0.2, k, 20) for k in range(20)]
    assert rates == [line["learning_rate"] for line in run.metrics("step")]


def test_every_step_has_its_own_crops(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0)
    images = pixels.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(20) % 2
    np.savez(tmp_path / "images.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    loaded = data.load(str(tmp_path / "images.npz"))
    states = []
    augment = data.ImageData.augment

    def seen(self, batch, generator):
        states.append(generator.get_state().numpy().tobytes())
        return augment(self, batch, generator)

    monkeypatch.setattr(data.ImageData, "augment", seen)
    trained(tmp_path / "run", loaded, epochs=3, batch_size=10)
    assert len(states) == len(set(states)) == 6


def test_the_optimizer_is_the_configured_one(digits, tmp_path):
    config = replace(SMALL, momentum=0.5, weight_decay=0.125)
    with training._Training(Run.create(tmp_path / "run", config), work(config, digits)) as made:
        group = made.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.5, 0.125)


def test_the_result_is_of_the_test_images(digits, tmp_path):
    run = trained(tmp_path / "run", digits, epochs=1)
    model = work(run.config, digits).load(run.folder)
    with torch.no_grad():
        answers = model(digits.inputs(digits.test.images)).argmax(-1)
    expected = (answers == digits.test.labels).float().mean(1)
    torch.testing.assert_close(torch.tensor(run.result["test_accuracy"]), expected, rtol=0, atol=0.01)  # a row in 359


def test_by_layer_there_are_weights_by_block_and_one_angle(digits, tmp_path):
    run = trained(tmp_path / "run", digits, epochs=1, granularity="layer")
    step = next(run.metrics("step"))
    assert len(step["weights"]) == 3 + 1  # three residual blocks, and stem and heads together
    assert len(step["cosines"]) == 2


def test_the_same_seed_gives_the_same_bits_and_another_does_not(digits, tmp_path):
    one, two = trained(tmp_path / "one", digits), trained(tmp_path / "two", digits)
    assert same_files(one, two)
    other = trained(tmp_path / "other", digits, seed=1)
    assert not same_files(one, other)


def test_training_draws_from_no_global_generator(digits, tmp_path):
    before = torch.get_rng_state()
    trained(tmp_path / "run", digits, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["gaml-soft", "ml"])
def test_ctrl_c_leaves_a_checkpoint_that_goes_on_bit_for_bit(method, digits, tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", digits, method=method)
    run = Run.create(tmp_path / "stopped", replace(SMALL, method=method))
    interrupting(monkeypatch, (7, 23))  # within the first epoch and within the second
    handler = signal.getsignal(signal.SIGINT)
    for done in (8, 24):
        with pytest.raises(Interrupted, match=f"stopped after step {done}"):
            train(run, work(run.config, digits))
        assert not run.finished
        assert signal.getsignal(signal.SIGINT) is handler
    train(run, work(run.config, digits))
    assert same_files(whole, run)
    assert run.result["test_accuracy"] == whole.result["test_accuracy"]
    train(run, work(run.config, digits))  # a finished run is left as it is
    assert same_files(whole, run)


@pytest.fixture
def heeds_ctrl_c():
    """Python's own handler, for a shell has what it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_while_results_are_written_ends_the_run_and_is_made_up_for(digits, tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", digits)
    run = Run.create(tmp_path / "stopped", SMALL)
    save = ImageWorkload.save

    def stopped(self, model, folder):
        os.kill(os.getpid(), signal.SIGINT)
        save(self, model, folder)

    monkeypatch.setattr(ImageWorkload, "save", stopped)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):  # noqa: PT012 - the handler runs at the next bytecode
        train(run, work(run.config, digits))
        time.sleep(1)
    monkeypatch.undo()
    assert not run.finished
    train(run, work(run.config, digits))
    assert same_files(whole, run)


COMMAND = [sys.executable, "-m", "gradalign.cli", "train", "--depth", "8", "--exits", "1,2", "--epochs", "4"]


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    """SIGKILL, no chance to write anything: the run goes on from its last epoch's checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*COMMAND, "--out", "whole"], check=True, cwd=tmp_path, env=environment, capture_output=True)
    process = subprocess.Popen([*COMMAND, "--out", "killed"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    # Half a line, as a kill in the middle of a write leaves it.
    metrics.write_bytes(metrics.read_bytes() + b'{"kind": "st')
    resume = [sys.executable, "-m", "gradalign.cli", "train", "--resume", "killed"]
    subprocess.run(resume, check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert same_files(Run.open(tmp_path / "whole"), Run.open(tmp_path / "killed"))


def test_a_loss_that_diverges_is_named_and_the_checkpoint_stands(digits, tmp_path):
    run = Run.create(tmp_path / "run", replace(SMALL, learning_rate=1e30, method="ml"))
    with pytest.raises(NonFiniteError, match=r"ml seed 0 diverged at step \d+: the gradient of .* must be"):
        train(run, work(run.config, digits))
    assert not run.finished


def test_metrics_are_json_lines(digits, tmp_path):
    run = trained(tmp_path / "run", digits, epochs=1, method="joint")
    lines = Path(run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert json.loads(lines[0])["conflicts"] == []
