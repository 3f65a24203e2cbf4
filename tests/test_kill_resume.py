"""kill -9 in the middle of a run, load, go on: the same bits as a run that nobody killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.long_run import CASES
from tests.test_resume import difference

STEPS = 8
KILLED_AFTER = (2, 4)  # before and after the overflow, and between alignments of update_every=3


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.long_run", str(folder), str(STEPS)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_after(folder, done):
    """Let the run save its step ``done``, kill it while it takes the next, and return what it began with."""
    with start(folder) as process:
        began = process.stdout.readline()
        for line in process.stdout:
            if line == f"saved {done}\n":
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    return began


def finish(folder):
    with start(folder) as process:
        began = process.stdout.readline()
        process.stdout.read()
    assert process.returncode == 0
    return began, torch.load(folder / "run.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The last checkpoints of a run that was killed and of one that was not."""
    folder = tmp_path_factory.mktemp("killed")
    began = [kill_after(folder, done) for done in KILLED_AFTER]
    last, killed = finish(folder)
    at = [int(line.rsplit(" ", 1)[1]) for line in [*began, last]]
    assert at[0] == 0
    for before, after, end in zip(KILLED_AFTER, at[1:], (KILLED_AFTER[1], STEPS), strict=True):
        assert before <= after < end  # it went on, from where it was killed
    _, whole = finish(tmp_path_factory.mktemp("whole"))
    return killed, whole


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_with_the_same_bits(runs, name):
    killed, whole = (run["cases"][name] for run in runs)
    assert difference(killed, whole) is None


@pytest.mark.parametrize("name", ["batches", "dropout", "done"])
def test_so_do_the_generators(runs, name):
    assert difference(runs[0][name], runs[1][name]) is None


def test_the_run_has_what_it_takes(runs):
    for case in runs[1]["cases"].values():
        assert case["scaler"]["scale"] not in (2.0**9, 2.0**10)  # it fell once, and grew
        assert case["scheduler"]["last_epoch"] == STEPS
        assert case["optimizer"]["state"][0]["step"] == STEPS - 1  # one was left out
