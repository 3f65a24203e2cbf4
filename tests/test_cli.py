from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import gradalign
from gradalign import cli
from gradalign.multiexit import policies
from gradalign.multiexit.evaluation import POLICIES
from gradalign.multiexit.runs import Run

SMALL = ["--depth", "8", "--exits", "1,2", "--epochs", "1", "--batch-size", "64", "--learning-rate", "0.05"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "--method", "gaml-hard", "--out", str(folder), *SMALL]) == 0
    return folder


def test_train_writes_a_run_and_says_where(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--method", "ml", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "ml: test accuracy of the exits" in out
    assert "20 steps in" in out
    names = {path.name for path in (tmp_path / "runs" / "ml-seed0").iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "model.safetensors", "logits.safetensors", "result.json",
        "depth-accuracy.png", "angles.png", "weights.png",
    }  # fmt: skip


def test_evaluate_judges_exits_and_every_policy(folder, capsys):
    assert cli.main(["evaluate", str(folder)]) == 0
    out = capsys.readouterr().out
    for policy in POLICIES:
        assert out.count(f"\n  {policy} ") == 2
    assert out.count("x in MACs, threshold ") == 12
    assert out.count("x in MACs, exit ") == out.count("x in MACs, patience ") == 2
    assert "temperatures" not in out
    assert out.count("1.5x:") == out.count("2.0x:") == 8
    accuracies = json.loads((folder / "result.json").read_text())["test_accuracy"]
    for number, accuracy in enumerate(accuracies, 1):
        assert f"exit {number:2}: {accuracy:.3f}" in out
    written = json.loads((folder / "evaluation.json").read_text())["policies"]
    assert len(written) == 16
    assert all(isinstance(policies.from_dict(one["policy"]), policies.Policy) for one in written)


def test_a_reader_that_goes_away_is_no_error(folder):
    command = [sys.executable, "-m", "gradalign.cli", "evaluate", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_run_of_an_earlier_version_is_named(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "run")
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | {"costs": [1.0, 2.0]}))
    assert cli.main(["evaluate", str(copy)]) == 1
    said = capsys.readouterr()
    assert "`run` must have the costs of exits and heads in its result, got" in said.err
    assert said.out == ""


def test_a_folder_with_a_run_is_refused_before_the_data_are_read(folder, tmp_path, capsys):
    (tmp_path / "broken.npz").write_bytes(b"")
    assert cli.main(["train", "--data", str(tmp_path / "broken.npz"), "--out", str(folder)]) == 1
    assert "`out` must be a folder without a run" in capsys.readouterr().err


def test_plot_draws_again(folder, capsys):
    (folder / "angles.png").unlink()
    assert cli.main(["plot", str(folder)]) == 0
    assert (folder / "angles.png").exists()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_compare_prints_the_table_twice(tmp_path, capsys):
    command = ["compare", "--methods", "joint", "gaml-soft", "--seeds", "0", "1", "--out", str(tmp_path), *SMALL]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "| gaml-soft | 2" in first
    assert (tmp_path / "comparison.md").read_text() in first
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first
    assert cli.main(["plot", str(tmp_path)]) == 0


ERRORS = {
    "no file": (["train", "--data", "nothing.npz"], r"`data` must be 'digits' or the path of an .npz file"),
    "depth": (["train", "--depth", "9"], "`depth` must be 6n + 2"),
    "exits": (["train", "--exits", "blocks"], "`exits` must be one of 'block', 'shallow-deep', got 'blocks'"),
    "alpha": (["train", "--alpha", "3"], "`alpha` must be in [0, 1], got 3.0"),
    "resume nothing": (["train", "--resume", "nothing"], "`run` must be the folder of a run"),
    "resume with settings": (
        ["train", "--resume", "nothing", "--epochs", "20", "--seed", "3"],
        "`--resume` must come without settings, for the run has its own, got --epochs, --seed",
    ),
    "device": (
        ["train", "--device", "cuda:77"],
        "`device` must be auto, cpu or one that torch has, got 'cuda:77'",
    ),
    "no device": (["train", "--device", "gpu"], "`device` must be auto, cpu or one that torch has, got 'gpu'"),
    "resume elsewhere": (
        ["train", "--resume", "nothing", "--out", "there"],
        "`--resume` must come without settings, for the run has its own, got --out",
    ),
    "evaluate nothing": (["evaluate", "nothing"], "`run` must be the folder of a run"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_sentence_and_leave_nothing_behind(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = ERRORS[case]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("gradalign: ")
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"gradalign {gradalign.__version__}\n"


def test_a_run_in_the_way_is_left_alone(folder, capsys):
    before = (folder / "config.json").read_text()
    assert cli.main(["train", "--out", str(folder)]) == 1
    assert "continue it with --resume" in capsys.readouterr().err
    assert (folder / "config.json").read_text() == before


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--method", "gaml"], ["train", "--epochs", "many"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "--help" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "gradalign.cli", "train", "--out", "run", *SMALL[:5], "200"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "a checkpoint is written, gradalign train --resume run continues from it" in error
    assert "Traceback" not in error


def test_tensorboard_has_losses_scores_and_angles(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    assert cli.main(["train", "--method", "ml", "--tensorboard", "--out", str(folder), *SMALL]) == 0
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    steps = list(Run.open(folder).metrics("step"))
    for tag, of_line in (
        ("loss/kd", lambda line: line["losses"]["kd"]),
        ("learning_rate", lambda line: line["learning_rate"]),
        ("align/cosine/ce/kd", lambda line: line["cosines"][0][1]),
    ):
        written = events.Scalars(tag)
        assert [event.step for event in written] == list(range(1, 21))
        assert [event.value for event in written] == pytest.approx([of_line(line) for line in steps], rel=1e-6)
    (epoch,) = Run.open(folder).metrics("epoch")
    assert events.Scalars("held_out_accuracy/last")[0].value == pytest.approx(epoch["held_out_accuracy"][-1])
    assert events.Tags()["histograms"] == ["align/angles"]
