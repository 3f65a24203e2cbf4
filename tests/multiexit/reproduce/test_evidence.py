"""The benchmark behind docs/evidence.md, on a small encoder and few rows."""

from __future__ import annotations

import json
import statistics
import sys

import pytest

from benchmarks import evidence
from gradalign.multiexit import policies
from gradalign.multiexit.runs import Run
from tests.multiexit.text.folders import backbone, glue


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of the runs and that of the results: two methods on two tasks, two settings, two seeds."""
    folder = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "TASKS", ("sst-2", "mrpc"))
        patch.setattr(evidence, "METHODS", ("joint", "kd:pcgrad"))
        patch.setattr(
            evidence,
            "ALIGNED",
            {
                "ml": ("ml", {}, ("mean", "sum")),
                "soft by layers": ("gaml-soft", {"granularity": "layer"}, ("sum",)),
            },
        )
        patch.setattr(evidence, "SETTINGS", {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "alpha": 0.97})
        paths = [str(backbone(folder / "encoder", layers=3)), str(glue(folder / "glue", train=24, dev=24))]
        options = ["--backbone", paths[0], "--data-dir", paths[1], "--runs", str(folder / "runs")]
        options += ["--seeds", "2", "--out", str(folder / "out")]
        patch.setattr(sys, "argv", ["evidence.py", *options, "--no-train"])
        evidence.main()
        before = (folder / "out" / "evidence.md").read_text(encoding="utf-8")
        patch.setattr(sys, "argv", ["evidence.py", *options])
        evidence.main()
    return folder / "runs", folder / "out", before


def cells_of(text, title):
    """Return the cells of the table under a title, by row and column."""
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(table[0][1:], row[1:], strict=True)) for row in table[2:]}


def is_of_table_2(run, method):
    return (run["method"], run["reduction"], run["granularity"]) == (method, "mean", "global")


def number(cell):
    return float(cell.split(" ±")[0])


def test_what_is_not_run_is_said(written):
    *_, before = written
    assert all(cell.startswith("not run") for cell in cells_of(before, "Table 2")["joint"].values())
    of_joint = cells_of(before, "Settings of the alignment")["joint"]
    assert of_joint["exit 3"] == "not run"


def test_each_run_is_recorded_once(written):
    runs, out, _ = written
    recorded = json.loads((out / "evidence.json").read_text(encoding="utf-8"))
    found = {
        (run["task"], run["method"], run["reduction"], run["granularity"], run["seed"]) for run in recorded["runs"]
    }
    table2 = {(task, method, "mean", "global") for task in ("sst-2", "mrpc") for method in ("joint", "kd:pcgrad")}
    settings = {
        ("sst-2", "ml", "mean", "global"),
        ("sst-2", "ml", "sum", "global"),
        ("sst-2", "gaml-soft", "sum", "layer"),
    }
    assert found == {(*one, seed) for one in table2 | settings for seed in (0, 1)}
    assert len(recorded["runs"]) == len(found) == len(list(runs.glob("runs/*/*/result.json")))
    assert "benchmarks/evidence.py" in recorded["command"]


def test_tables_are_of_the_runs(written):
    runs, out, _ = written
    page = (out / "evidence.md").read_text(encoding="utf-8")
    of_ml = [run for folder in runs.glob("runs/sst-2/ml-*") if (run := Run.open(folder)).config.reduction == "sum"]
    assert len(of_ml) == 2
    row = cells_of(page, "Settings of the alignment")["ml, sum"]
    scores = [run.result["test_accuracy"] for run in of_ml]
    assert number(row["mean of exits"]) == pytest.approx(
        100 * statistics.fmean(map(statistics.fmean, scores)), abs=0.06
    )
    for column, exit in (("exit 1", 0), ("exit 3", 2), ("last exit", -1)):
        assert number(row[column]) == pytest.approx(100 * statistics.fmean(one[exit] for one in scores), abs=0.06)
    layers, right = [], []
    for run in of_ml:
        policy = policies.calibrate(policies.Entropy(0.0), run.logits("held_out")[0], 1.95)
        logits, labels = run.logits("test")
        decision = policy.decide(logits)
        layers.append(3 * 24 / int(decision.exits.sum()))
        right.append(float((decision.labels == labels).double().mean()))
    assert number(row["layers x"]) == pytest.approx(statistics.fmean(layers), abs=0.006)
    assert number(row["early"]) == pytest.approx(100 * statistics.fmean(right), abs=0.06)
    steps = [step for run in of_ml for step in run.metrics("step")]
    conflicting = statistics.fmean(step["cosines"][0][1] < 0 for step in steps)
    assert number(row["conflicting steps, %"]) == pytest.approx(100 * conflicting, abs=0.51)
    assert cells_of(page, "Settings of the alignment")["joint"]["conflicting steps, %"] == "-"


def test_conflicts_are_of_all_parameters_and_reversals_of_any_block(written):
    runs, out, _ = written
    folders = [folder for folder in runs.glob("runs/sst-2/gaml-soft-*") if Run.open(folder).config.reduction == "sum"]
    steps = [list(Run.open(folder).metrics("step")) for folder in folders]
    assert len(steps) == 2
    reversed_steps = [[min(min(block) for block in step["weights"]) < 0 for step in of_run] for of_run in steps]
    conflicting = [[step["cosines"][0][1] < 0 for step in of_run] for of_run in steps]
    expected = [100 * statistics.fmean(map(statistics.fmean, several)) for several in (conflicting, reversed_steps)]
    assert expected[1] > 0
    page = (out / "evidence.md").read_text(encoding="utf-8")
    row = cells_of(page, "Settings of the alignment")["soft by layers, sum"]
    shown = [number(row[f"{kind} steps, %"]) for kind in ("conflicting", "reversed")]
    assert shown == pytest.approx(expected, abs=0.51)
    recorded = json.loads((out / "evidence.json").read_text(encoding="utf-8"))["runs"]
    shares = [
        run["conflicting and reversed steps, %"]
        for run in recorded
        if (run["method"], run["reduction"]) == ("gaml-soft", "sum")
    ]
    assert [statistics.fmean(share) for share in zip(*shares, strict=True)] == pytest.approx(expected)


def test_entropy_serves_all_methods_of_table_2(written):
    _, out, _ = written
    page = (out / "evidence.md").read_text(encoding="utf-8")
    recorded = json.loads((out / "evidence.json").read_text(encoding="utf-8"))["runs"]
    for method, cells in cells_of(page, "The same runs, all by entropy").items():
        for task in ("sst-2", "mrpc"):
            of_task = [run for run in recorded if (run["method"], run["task"]) == (method, task)]
            early = statistics.fmean(run["early by entropy"]["score"] for run in of_task)
            assert number(cells[f"{task}, early"]) == pytest.approx(early, abs=0.06)
            exits = [100 * statistics.fmean(run["development"]) for run in of_task]
            assert number(cells[f"{task}, mean of exits"]) == pytest.approx(statistics.fmean(exits), abs=0.06)
        layers = [run["early by entropy"]["layers"] for run in recorded if is_of_table_2(run, method)]
        assert len(layers) == 4
        assert number(cells["layers x"]) == pytest.approx(statistics.fmean(layers), abs=0.006)


def test_pictures_are_written_and_shown(written):
    _, out, _ = written
    page = (out / "evidence.md").read_text(encoding="utf-8")
    for reduction in ("mean", "sum"):
        assert f"(evidence-angles-{reduction}.png)" in page
        assert (out / f"evidence-angles-{reduction}.png").stat().st_size > 10_000
        assert f"## Figure 3: angles between the gradients, distillation by {reduction}" in page
    assert sorted(path.name for path in out.iterdir()) == [
        "evidence-angles-mean.png", "evidence-angles-sum.png", "evidence.json", "evidence.md",
    ]  # fmt: skip
