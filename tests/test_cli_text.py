"""The commands on text: train --task, search, reproduce."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from transformers.utils import logging

from gradalign import cli
from gradalign.multiexit import methods
from gradalign.multiexit.runs import Run
from gradalign.multiexit.text.workload import MODEL
from tests.multiexit.text.folders import backbone, glue


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The options of a short run; four layers are the fewest that bert-pkd halves."""
    folder = tmp_path_factory.mktemp("cli-text")
    return [
        "--backbone", str(backbone(folder / "encoder", layers=4)), "--data-dir", str(glue(folder / "glue", 24, 10)),
        "--epochs", "1", "--batch-size", "10",
    ]  # fmt: skip


@pytest.mark.parametrize("method", [*methods.names("text"), "kd:pcgrad", "exits:mgda"])
def test_every_method_trains(method, small, tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(["train", "--task", "sst-2", "--method", method, "--out", str(folder), *small]) == 0
    out = capsys.readouterr()
    assert f"{method}: development accuracy of the exits" in out.out
    assert "Loading weights" not in out.err
    assert "Writing model shards" not in out.err
    run = Run.open(folder)
    assert run.config.method == method
    assert run.finished
    assert (folder / MODEL / "model.safetensors").is_file()
    assert cli.main(["evaluate", str(folder)]) == 0


def test_progress_bars_are_back_after_a_command(small, tmp_path, capsys):
    assert logging.is_progress_bar_enabled()
    assert cli.main(["train", "--task", "sst-9", "--out", str(tmp_path / "run"), *small]) == 1
    assert cli.main(["train", "--task", "sst-2", "--out", str(tmp_path / "run"), *small]) == 0
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
    assert "trained already" in capsys.readouterr().err


def test_settings_reach_the_configuration(small, tmp_path):
    given = [
        "--granularity", "layer", "--scope", "trunk", "--precision", "bfloat16", "--clip", "2", "--no-buckets",
        "--max-train", "20", "--exit", "linear", "--seed", "3", "--clamp", "--no-full-step", "--no-pretrained",
    ]  # fmt: skip
    assert cli.main(["train", "--task", "sst2", "--out", str(tmp_path / "run"), *small, *given]) == 0
    values = Run.open(tmp_path / "run").config.to_dict()
    assert {
        "granularity": "layer", "scope": "trunk", "precision": "bfloat16", "clip": 2.0, "buckets": False,
        "max_train": 20, "exit": "linear", "seed": 3, "clamp": True, "full_step": False, "pretrained": False,
        "task": "sst-2",
    }.items() <= values.items()  # fmt: skip


def test_a_killed_process_goes_on_bit_for_bit(small, tmp_path):
    """SIGKILL: the run goes on from its last epoch's checkpoint, with dropout."""
    options = ["--task", "sst-2", *small, "--epochs", "8", "--batch-size", "2", "--patience", "20"]
    train = [sys.executable, "-m", "gradalign.cli", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums of other threads have other bits
    whole = [*train, *options, "--out", str(tmp_path / "whole")]
    subprocess.run(whole, check=True, env=environment, capture_output=True)
    folder = tmp_path / "killed"
    killed = [*train, *options, "--out", str(folder)]
    process = subprocess.Popen(killed, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists()
    subprocess.run([*train, "--resume", str(folder)], check=True, env=environment, capture_output=True)
    for name in (f"{MODEL}/model.safetensors", "metrics.jsonl", "logits.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_compare_on_text(small, tmp_path, capsys):
    command = ["compare", "--task", "sst-2", "--methods", "joint", "ml", "--out", str(tmp_path), *small]
    assert cli.main(command) == 0
    assert "| ml " in capsys.readouterr().out


def test_search_prints_trials_and_the_table_sorted(small, tmp_path, capsys):
    command = [
        "search", "--task", "sst-2", "--folds", "2", "--grid", "learning_rate=1e-3,1e-2", "batch-size=5", "--out",
        str(tmp_path), *small,
    ]  # fmt: skip
    assert cli.main(command) == 0
    out = capsys.readouterr()
    assert "Loading weights" not in out.err
    assert out.out.startswith("trial 0: learning_rate=0.001, batch_size=5: ")
    table = (tmp_path / "search.md").read_text()
    assert table in out.out
    means = [float(line.split("|")[3]) for line in table.splitlines()[2:]]
    assert len(means) == 2
    assert means == sorted(means, reverse=True)
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert sorted(trial["mean"] for trial in trials) == pytest.approx(sorted(means), abs=1e-4)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == out.out


def test_search_tries_some_of_the_grid(small, tmp_path, capsys):
    command = ["search", "--task", "sst-2", "--folds", "2", "--trials", "1", "--grid", "alpha=0.1,0.2,0.3"]
    assert cli.main([*command, "--out", str(tmp_path), *small]) == 0
    assert capsys.readouterr().out.count("trial 0: ") == 1
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 1


def test_reproduce_prints_the_table_and_its_files(small, tmp_path, capsys):
    command = ["reproduce", "figure3", "--tasks", "SST2", "--seeds", "2", "--out", str(tmp_path / "out"), *small]
    assert cli.main([*command, "--no-train"]) == 0
    assert "| ml on sst-2 | not run [50.0] | not run |" in capsys.readouterr().out
    assert cli.main(command) == 0
    out = capsys.readouterr()
    assert "not run" not in out.out
    assert "Loading weights" not in out.err
    for ending in ("md", "csv", "png"):
        assert out.out.count(str(tmp_path / "out" / f"figure3.{ending}")) == 1


ERRORS = {
    "task": (["train", "--task", "sst-3"], "`task` must be one of"),
    "images": (["train", "--task", "rte", "--depth", "8"], "`--depth` must come with a run on images, got one on text"),
    "text": (
        ["train", "--max-length", "9"],
        "`--max-length` must come with a run on text, with --task, got one on images",
    ),
    "data": (["train", "--task", "rte"], "RTE"),
    "exit": (["train", "--task", "sst-2", "--exit", "top"], "`exit` must be one of"),
    "search images": (["search"], "`--task` must name a GLUE task to search on, got none"),
    "search twice": (
        ["search", "--task", "sst-2", "--grid", "alpha=0.1", "alpha=0.2"],
        "`--grid` must name each setting once, got alpha again",
    ),
    "search nothing": (["search", "--task", "sst-2", "--grid", "alpha="], "got none for ['alpha']"),
    "folds": (["search", "--task", "sst-2", "--folds", "1"], "`folds` must be at least 2, got 1"),
    "trials": (["search", "--task", "sst-2", "--trials", "0"], "`trials` must be at least 1, got 0"),
    "seeds": (["reproduce", "table1", "--seeds", "0"], "`--seeds` must be at least 1, got 0"),
    "methods": (["reproduce", "table5", "--methods", "ml"], "`methods` must be left out for table5"),
    "reproduce task": (["reproduce", "table1", "--tasks", "sst-3"], "`task` must be one of"),
    "reproduce images": (["reproduce", "table1", "--depth", "8"], "`--depth` must come with a run on images"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_sentence_and_leave_nothing_behind(case, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = ERRORS[case]
    given = small[:4] if case != "text" else []
    assert cli.main([*arguments, *given]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("gradalign: ")
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_backbone_is_needed_and_named(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--task", "sst-2"]) == 1
    assert "`--backbone` must name an encoder for a run on text" in capsys.readouterr().err
    assert cli.main(["train", "--task", "sst-2", "--backbone", str(tmp_path), *small[2:4]]) == 1
    error = capsys.readouterr().err
    assert "`backbone` must be a folder with an encoder and its tokenizer" in error
    assert len(error.splitlines()) == 1


def test_a_wrong_axis_is_wrong_usage(small, capsys):
    for axis in ("alpa=1", "alpha=high", "alpha"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["search", "--task", "sst-2", "--grid", axis, *small])
        assert f"got '{axis}'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reproduce", "table6"])


@pytest.mark.parametrize("command", ["compare", "search", "reproduce table2"])
def test_commands_for_one_process_say_so(command, small, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([*command.split(), *small]) == 1
    assert f"`torchrun` must start one process for {command.split()[0]}, got 2" in capsys.readouterr().err


def test_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in ("(default: 10 for images, 5 for text)", "(default: 128 for images, 32 for text)", "(default: 1.0)"):
        assert said in text
