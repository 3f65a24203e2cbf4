from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradalign.multiexit import processes
from gradalign.multiexit.configs import TextConfig
from gradalign.multiexit.runs import Run
from gradalign.multiexit.text.workload import MODEL
from tests.distributed.processes import run as on_ranks
from tests.multiexit import joined
from tests.multiexit.text.folders import backbone, glue


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined")
    return TextConfig(
        task="sst-2",
        backbone=str(backbone(folder / "encoder", layers=2, dropout=0.0)),
        data_dir=str(glue(folder / "glue", train=25, dev=10)),
        epochs=2,
        batch_size=7,  # 21 rows, so that one rank has 4 of a batch and the other 3
        learning_rate=1e-3,
    )


def test_alone_there_is_nothing_to_agree_on():
    assert (processes.rank(), processes.ranks()) == (0, 1)
    assert processes.any_rank(True, joined.CPU)
    assert not processes.any_rank(False, joined.CPU)
    assert processes.mean(torch.tensor(3.0)) == 3.0
    processes.wait()
    with processes.joined(joined.CPU) as device:
        assert device == joined.CPU
        assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def both(config, tmp_path_factory):
    """A run that two processes trained, and what each of them returned."""
    folder = tmp_path_factory.mktemp("both")
    run = Run.create(folder / "run", config)
    return run, on_ranks(joined.all_at_once, 2, str(run.folder), folder=folder)


def test_ranks_agree(both):
    _, (one, two) = both
    assert [one["agreed"]["rank"], two["agreed"]["rank"]] == [0, 1]
    for said in (one["agreed"], two["agreed"]):
        assert said["ranks"] == 2
        assert said["any"] == [True, False]
        assert said["mean"] == 1.5
        assert said["joined"] == "cpu"


def test_an_error_of_the_first_process_ends_the_other(both):
    """The folder holds a run: the first finds out, the other would wait for it."""
    _, (one, two) = both
    assert [one["refused"], two["refused"]] == [1, 1]


def test_two_processes_train_as_one(config, both, tmp_path):
    """Also when Ctrl-C reaches the second rank alone: both stop after the same step and go on from the first's file."""
    alone = Run.create(tmp_path / "alone", config)
    single = joined.trained(0, 1, str(alone.folder))["weights"]
    together, (one, two) = both[0], (said["trained"] for said in both[1])
    assert [one["stopped"], two["stopped"]] == [4, 4]
    assert [one["saves"], two["saves"]] == [1, 0]
    for name, tensor in one["weights"].items():
        # A key's bias does nothing, its gradient is rounding, of which AdamW makes steps.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(tensor, single[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(together.logits("test")[0], alone.logits("test")[0], rtol=0, atol=1e-5)
    assert together.result["steps"] == alone.result["steps"] == 6
    for now, before in zip(together.metrics("step"), alone.metrics("step"), strict=True):
        assert now["losses"] == pytest.approx(before["losses"], abs=1e-5)  # of the whole batch, not of a rank's part
        assert now["accuracy"] == pytest.approx(before["accuracy"])
        assert now["weights"] == pytest.approx(before["weights"], abs=1e-4)


def test_torchrun(config, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*joined.command(config), "--epochs", "1", "--batch-size", "10", "--device", "cpu", "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [*torchrun, "-m", "gradalign.cli", *options],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("development accuracy of the exits") == 1
    run = Run.open(tmp_path / "run")
    assert run.finished
    assert len(list(run.metrics("step"))) == 3
    assert (run.folder / MODEL).is_dir()
    assert run.config == replace(config, epochs=1, batch_size=10, method="gaml-soft", learning_rate=2e-5)
