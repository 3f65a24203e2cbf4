from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from gradalign.multiexit import policies
from gradalign.multiexit.comparison import Row, _row, compare, runs_in, runs_of, table
from gradalign.multiexit.configs import ImageConfig
from gradalign.multiexit.evaluation import Outcome, at_score
from gradalign.multiexit.figures import plot_run, plot_runs
from gradalign.multiexit.runs import Run
from gradalign.multiexit.workloads import judge_of

SMALL = ImageConfig(depth=8, exits=(1, 2), epochs=1, batch_size=64, learning_rate=0.05)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return folder, compare(SMALL, ["joint", "gaml-soft"], [0, 1], folder)


def test_a_row_says_what_its_run_came_to(compared):
    folder, rows = compared
    assert [(row.method, row.seed) for row in rows] == [("joint", 0), ("gaml-soft", 0), ("joint", 1), ("gaml-soft", 1)]
    for row in rows:
        run = Run.open(folder / f"{row.method}-seed{row.seed}")
        accuracy = run.result["test_accuracy"]
        assert row.last_score == accuracy[-1]
        assert row.mean_score == pytest.approx(sum(accuracy) / 3)
        steps = list(run.metrics("step"))
        if row.method == "joint":
            assert row.conflicts is None
        else:
            assert row.conflicts == pytest.approx(sum(step["angles"][0][1] > 90 for step in steps) / len(steps))
        if row.equal is not None:
            assert row.equal.speed_up >= 1
    assert len(json.loads((folder / "comparison.json").read_text())) == 4


def test_the_speed_up_is_at_the_first_methods_held_out_accuracy(compared):
    folder, rows = compared
    for row in rows:
        logits, labels = Run.open(folder / f"joint-seed{row.seed}").logits("held_out")
        wanted = float((logits[-1].argmax(-1) == labels).double().mean())
        run = Run.open(folder / f"{row.method}-seed{row.seed}")
        own, test = run.logits("held_out"), run.logits("test")
        expected = at_score(policies.Entropy(0.0), own, test, wanted, run.costs, judge_of(SMALL))
        assert row.equal == expected
        if expected is not None:  # chosen on held-out images, told of test images
            decision = expected.policy.decide(test[0])
            assert row.equal.score == pytest.approx(float((decision.labels == test[1]).double().mean()))


def test_a_reversed_step_is_one_with_a_weight_below_zero(compared, tmp_path):
    folder, _ = compared
    source = Run.open(folder / "gaml-soft-seed0")
    lines = [json.loads(line) for line in (source.folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:5]:
        line["reversals"] = 1
    for line in lines[5:]:
        line["reversals"] = 0
    copy = Run(tmp_path / "copy")
    shutil.copytree(source.folder, copy.folder)
    (copy.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _row(copy, 0.0).reversals == 5 / 20


@pytest.mark.parametrize(("methods", "seeds"), [(["joint", "joint"], [0]), (["joint"], [1, 1])])
def test_doubles_are_refused(methods, seeds, tmp_path):
    with pytest.raises(ValueError, match=r"`(methods|seeds)` must be different from one another, got"):
        compare(SMALL, methods, seeds, tmp_path)


def test_a_second_call_takes_what_is_there(compared):
    folder, rows = compared
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/model.safetensors")}
    assert len(before) == 4
    assert compare(SMALL, ["joint", "gaml-soft"], [0, 1], folder) == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_configuration_is_refused(compared):
    folder, _ = compared
    with pytest.raises(
        ValueError, match=r"`out` must be a folder whose runs have this configuration, got .* with epochs=1;"
    ):
        compare(replace(SMALL, epochs=2), ["joint"], [0], folder)


def test_figures_of_a_comparison_and_of_a_run(compared, tmp_path):
    folder, rows = compared
    runs = runs_of(rows, folder)
    assert {method: [run.folder for run in of_method] for method, of_method in runs_in(folder).items()} == {
        method: [run.folder for run in of_method] for method, of_method in runs.items()
    }
    assert {method: len(of_method) for method, of_method in runs.items()} == {"joint": 2, "gaml-soft": 2}
    files = plot_runs(runs, tmp_path)
    assert [path.name for path in files] == ["depth-accuracy.png", "angles.png", "weights.png"]
    for path in files:
        assert path.read_bytes().startswith(PNG)
    assert [path.name for path in plot_run(runs["joint"][0])] == ["depth-accuracy.png"]
    assert [path.name for path in plot_run(runs["gaml-soft"][0])] == [path.name for path in files]


def row(method, seed, mean, last, conflicts, speed_up):
    equal = None if speed_up is None else Outcome(policies.Entropy(0.1), last, speed_up, speed_up)
    return Row(method, seed, "accuracy", mean, last, conflicts, 0.25, equal, 1.0)


def test_the_table_has_mean_and_spread():
    # Two values a and b: mean (a + b) / 2, sample deviation |a - b| / sqrt 2.
    text = table(
        [
            row("joint", 0, 0.5, 0.7, None, 1.0),
            row("joint", 1, 0.6, 0.9, None, None),
            row("ml", 0, 0.25, 0.5, 0.5, None),
        ]
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == [
        "method",
        "seeds",
        "mean of exits",
        "last exit",
        "conflicting steps",
        "reversed steps",
        "speed-up",
    ]
    assert lines[2] == ["joint", "2", "55.0 ± 7.1 %", "80.0 ± 14.1 %", "-", "-", "1.00x (1 of 2 seeds)"]
    assert lines[3] == ["ml", "1", "25.0 %", "50.0 %", "50.0 %", "25.0 %", "-"]


def test_each_method_has_its_own_settings(tmp_path):
    compare(SMALL, ["joint", "dbt"], [0], tmp_path)
    alphas = {method: Run.open(tmp_path / f"{method}-seed0").config.alpha for method in ("joint", "dbt")}
    assert alphas == {"joint": 0.3, "dbt": 0.5}
