from __future__ import annotations

import csv
import shutil
import statistics
from dataclasses import replace

import pytest
import torch

from gradalign.multiexit import attempts, policies
from gradalign.multiexit.evaluation import policy_of
from gradalign.multiexit.reproduce import Order, published, reproduce
from gradalign.multiexit.reproduce import images as of_images
from gradalign.multiexit.reproduce.judged import judged
from gradalign.multiexit.text.workload import TextWorkload
from tests.multiexit.reproduce.pieces import PIECES, order_of


def cells_of(files):
    (sheet,) = [file for file in files if file.suffix == ".csv"]
    with sheet.open(encoding="utf-8", newline="") as file:
        return {(line["row"], line["column"]): line for line in csv.DictReader(file)}


def mean(cells, row, column):
    return float(cells[row, column]["mean"])


def runs_of(order, method, task="sst-2", **changed):
    runs = order.finished([order.text(method, task, seed, **changed) for seed in order.seeds])
    assert len(runs) == 2
    return runs


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_is_a_page_a_sheet_and_a_picture(name, made):
    files = {file.suffix: file for file in made[name]}
    assert set(files) == {".md", ".csv", ".png"}
    assert {file.stem for file in made[name]} == {name}
    page = files[".md"].read_text(encoding="utf-8")
    assert page.startswith(f"# {name[0].upper()}{name[1:-1]} {name[-1]}: ")
    assert "not run" not in page
    assert " ± " in page
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    assert all(line["finished"] == line["wanted"] for line in cells_of(made[name]).values())


def test_a_second_call_trains_nothing_and_pieces_share_runs(text, made, monkeypatch):
    files = [file for file in text.folder.glob("runs/**/*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files}
    monkeypatch.setattr(attempts, "train", None)
    for name in PIECES:
        pages = {file: file.read_text(encoding="utf-8") for file in made[name] if file.suffix != ".png"}
        reproduce(name, order_of(text, name))
        assert {file: file.read_text(encoding="utf-8") for file in pages} == pages
    assert {file: file.stat().st_mtime_ns for file in text.folder.glob("runs/**/*") if file.is_file()} == before
    folders = [folder.name for folder in text.folder.glob("runs/sst-2/*")]
    # ml: four alphas, of which 0.3 is that of the other pieces
    assert sum(name.startswith("ml-") for name in folders) == 2 * 4
    assert sum(name.startswith("single-") for name in folders) == 2
    assert not list(text.folder.glob("runs/*/*/checkpoint.pt"))


@pytest.mark.parametrize("name", PIECES)
def test_with_nothing_there_all_cells_say_so(name, text, tmp_path):
    files = reproduce(name, replace(order_of(text, name), folder=tmp_path / "out"), training=False)
    assert {file.suffix for file in files} == {".md", ".csv", ".png"}
    assert all(file.is_file() for file in files)
    assert all(line["finished"] == "0" for line in cells_of(files).values())
    assert files[0].read_text(encoding="utf-8").count("not run") == len(cells_of(files))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_part_of_the_seeds_is_said(text, made, tmp_path):
    del made
    shutil.copytree(text.folder, tmp_path / "out")
    order = replace(order_of(text, "table3"), folder=tmp_path / "out")
    (tmp_path / "out" / order.run(order.text("ml", "sst-2", 1, alpha=0.5)).folder / "result.json").unlink()
    page = reproduce("table3", order, training=False)[0].read_text(encoding="utf-8")
    assert page.count("(1 of 2 seeds)") == 1
    order = replace(order, tasks=("cola",))
    page = reproduce("table3", order, training=False)[0].read_text(encoding="utf-8")
    assert "| cola, alpha 0.3 | not run [49.2] | not run [51.1] |" in page


def test_table_1_has_the_exits_of_the_pairs(text, made):
    cells = cells_of(made["table1"])
    rows = {
        (1, "early"): "sst-2, exits 1 and 4: exit 1",
        (1, "last"): "sst-2, exits 1 and 4: exit 4",
        (2, "early"): "sst-2, exits 2 and 4: exit 2",
        (2, "last"): "sst-2, exits 2 and 4: exit 4",
    }
    assert {row for row, _ in cells} == set(rows.values())
    columns = {
        "alone": ("pml-direct", "single"),
        "jointly": ("pml-joint", "pml-joint"),
        "taught by the other": ("pml-kd-early", "pml-kd-late"),
        "mutually": ("pml-mutual", "pml-mutual"),
    }
    for (early, which), row in rows.items():
        for number, (column, methods) in enumerate(columns.items()):
            method = methods[which == "last"]
            runs = runs_of(text, method, **({} if method == "single" else {"pair_exit": early}))
            exit = early - 1 if which == "early" else 3
            expected = statistics.fmean(100 * run.result["test_accuracy"][exit] for run in runs)
            assert mean(cells, row, column) == pytest.approx(expected)
            paper = published.TABLE1["sst-2", {1: 1, 2: 6}[early], which][number]
            assert float(cells[row, column]["paper"]) == paper


def test_table_2_is_of_calibrated_policies_on_development_rows(text, made):
    """Patience and entropy again, from the runs' logits."""
    cells = cells_of(made["table2"])
    for method in ("joint", "ml", "deebert"):
        layers, macs = [], []
        for task, main in (("sst-2", lambda a, y: (a == y).float().mean()), ("mrpc", accuracy_and_f1)):
            scores = []
            for run in runs_of(text, method, task):
                held_out, (logits, labels) = run.logits("held_out"), run.logits("test")
                kind = policy_of("entropy" if method == "deebert" else "patience", held_out)
                policy = policies.calibrate(kind, held_out[0], 1.95)
                exits = policy(logits)
                answers = logits.argmax(-1)[exits - 1, torch.arange(24)]
                scores.append(100 * float(main(answers, labels)))
                layers.append(4 * 24 / int(exits.sum()))
                costs = torch.tensor(run.costs.exits, dtype=torch.float64)
                macs.append(float(24 * run.costs.bare / costs[exits - 1].sum()))
            assert mean(cells, method, task) == pytest.approx(statistics.fmean(scores))
            assert float(cells[method, task]["paper"]) == published.TABLE2[method][1][task]
        assert mean(cells, method, "layers x") == pytest.approx(statistics.fmean(layers))
        assert mean(cells, method, "MACs x") == pytest.approx(statistics.fmean(macs))
        assert float(cells[method, "layers x"]["paper"]) == published.TABLE2[method][0]
        assert mean(cells, method, "seconds x") > 0
        assert cells[method, "layers x"]["finished"] == "4"


def accuracy_and_f1(answers, labels):
    both = int(((answers == 1) & (labels == 1)).sum())
    wrong = int((answers != labels).sum())
    f1 = 2 * both / (2 * both + wrong) if both + wrong else 0.0
    return ((answers == labels).double().mean() + f1) / 2


def test_networks_with_one_answer_run_at_full_depth(text, made):
    cells = cells_of(made["table2"])
    for column in ("layers x", "MACs x", "seconds x"):
        assert mean(cells, "single", column) == pytest.approx(1.0)
    last = [100 * run.result["test_accuracy"][-1] for run in runs_of(text, "single")]
    assert mean(cells, "single", "sst-2") == pytest.approx(statistics.fmean(last))
    (half, _) = runs_of(text, "bert-6l")
    assert half.logits("test")[0].shape[0] == 1
    assert mean(cells, "bert-6l", "layers x") == pytest.approx(2.0)  # two layers of four
    costs = [run.result["whole_cost"] / run.costs.bare for run in runs_of(text, "bert-6l")]
    assert 1.5 < costs[0] < 2.1
    assert mean(cells, "bert-6l", "MACs x") == pytest.approx(statistics.fmean(costs), rel=0.02)


def test_table_4_has_steps_and_seconds_of_all_stages(text, made):
    cells = cells_of(made["table4"])
    assert mean(cells, "joint", "sst-2 steps") == 2  # 20 rows in batches of 10
    assert mean(cells, "fastbert", "sst-2 steps") == 2 + 2 * 2
    seconds = statistics.fmean(run.result["seconds"] for run in runs_of(text, "fastbert"))
    assert mean(cells, "fastbert", "sst-2 seconds") == pytest.approx(seconds)
    assert cells["joint", "sst-2 steps"]["paper"] == "3800"
    page = made["table4"][0].read_text(encoding="utf-8")
    assert "it never stopped early" in page
    longer = replace(order_of(text, "table4"), settings={**text.settings, "epochs": 9})
    page = reproduce("table4", longer, training=False)[0].read_text(encoding="utf-8")
    assert "after 5 epochs without a better score, 9 epochs at most." in page
    reproduce("table4", order_of(text, "table4"), training=False)


def test_figure_3_is_of_the_angles_of_every_step(text, made):
    cells = cells_of(made["figure3"])
    for method in ("ml", "gaml-soft"):
        above, middle = [], []
        for run in runs_of(text, method):
            angles = [step["angles"][0][1] for step in run.metrics("step")]
            above.append(100 * sum(angle > 90 for angle in angles) / len(angles))
            middle.append(statistics.median(angles))
        assert mean(cells, f"{method} on sst-2", "above 90°, %") == pytest.approx(statistics.fmean(above))
        assert mean(cells, f"{method} on sst-2", "median, °") == pytest.approx(statistics.fmean(middle))
    assert cells["ml on sst-2", "above 90°, %"]["paper"] == "50.0"
    with pytest.raises(ValueError, match=r"`methods` must have cross-entropy and .* figure3, got joint"):
        reproduce("figure3", replace(text, methods=("ml", "joint")))


def test_figures_4_and_5_have_a_score_an_exit(text, made):
    budgeted, tuned = cells_of(made["figure4"]), cells_of(made["figure5"])
    single = statistics.fmean(100 * run.result["test_accuracy"][-1] for run in runs_of(text, "single"))
    for exit in range(1, 5):
        joint = [100 * run.result["test_accuracy"][exit - 1] for run in runs_of(text, "joint")]
        assert mean(budgeted, "sst-2, joint", str(exit)) == pytest.approx(statistics.fmean(joint))
        assert mean(budgeted, "sst-2, single, last exit", str(exit)) == pytest.approx(single)
    for exit in range(1, 4):
        alone = runs_of(text, "pml-direct", pair_exit=exit)
        expected = statistics.fmean(100 * run.result["test_accuracy"][exit - 1] for run in alone)
        assert mean(tuned, "sst-2, fine-tuned to that layer", str(exit)) == pytest.approx(expected)
    assert mean(tuned, "sst-2, fine-tuned to that layer", "4") == pytest.approx(single)
    with pytest.raises(ValueError, match=r"`methods` must keep an exit after each layer for figure4, got bert-6l"):
        reproduce("figure4", replace(text, methods=("bert-6l",)))


def test_table_8_is_at_the_papers_speed_up(images):
    files = reproduce("table8", images)
    cells = cells_of(files)
    assert {file.suffix for file in files} == {".md", ".csv", ".png"}
    assert {row for row, _ in cells} == set(published.TABLE8)
    for method in ("joint", "gaml-soft"):
        layers = []
        for run in images.finished([images.images(method, seed) for seed in (0, 1)]):
            policy = policies.calibrate(policies.Patience(1), run.logits("held_out")[0], 1.30)
            layers.append(3 * 20 / int(policy(run.logits("test")[0]).sum()))
        assert mean(cells, method, "layers x") == pytest.approx(statistics.fmean(layers))
        assert float(cells[method, "accuracy on shades"]["paper"]) == published.TABLE8[method]["cifar-10"][1]
    assert mean(cells, "single", "MACs x") == pytest.approx(1.0)
    assert "ResNet-56 on CIFAR-10" in files[0].read_text(encoding="utf-8")
    other = replace(images, settings={**images.settings, "data": "cifar100.npz"})
    assert of_images._paper(other) == ("cifar100", "cifar-100", 1.27)


def test_seconds_are_measured_once(text, made, monkeypatch):
    del made
    (run, _) = runs_of(text, "joint")
    first = judged(run, "patience", "cpu")
    monkeypatch.setattr("gradalign.multiexit.reproduce.judged.seconds_saved", None)
    assert judged(run, "patience", "cpu") == first
    (run.folder / "judged-patience-1.95.json").unlink()
    with pytest.raises(TypeError, match="not callable"):
        judged(run, "patience", "cpu")
    monkeypatch.undo()
    assert judged(run, "patience", "cpu").score == first.score


def test_regression_is_served_by_patience(text, tmp_path):
    order = replace(text, folder=tmp_path, tasks=("STS-B",), seeds=(0,), methods=("joint", "deebert"))
    cells = cells_of(reproduce("table2", order))
    assert all(line["finished"] == "1" for line in cells.values())
    (run,) = order.finished([order.text("deebert", "sts-b", 0)])
    assert "Patience" in judged(run, "patience", "cpu").policy
    with pytest.raises(ValueError, match="`tasks` must have classes for table5, got sts-b"):
        reproduce("table5", replace(order, methods=()))


def test_a_run_that_diverges_is_left_out(text, tmp_path, monkeypatch, capsys):
    make = TextWorkload.make_model

    def broken(self):
        model = make(self)
        if self.config.seed == 0:
            model.heads[0].linear.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(TextWorkload, "make_model", broken)
    order = replace(text, folder=tmp_path, methods=("joint",))
    page = reproduce("table4", order)[0].read_text(encoding="utf-8")
    assert "(1 of 2 seeds)" in page
    assert "joint on sst-2 seed 0 diverged at step 1" in capsys.readouterr().err


def test_orders_are_checked(text):
    assert replace(text, tasks=("SST2", "sst-2"), methods=("ml", "ml")).tasks == ("sst-2",)
    with pytest.raises(ValueError, match="`seeds` must hold one at least, got none"):
        Order(text.folder, seeds=())
    with pytest.raises(ValueError, match="`methods` must be left out for table1, which has its own, got ml"):
        reproduce("table1", replace(text, methods=("ml",)))
    for name, setting in (("table1", "pair_exit"), ("table3", "alpha"), ("figure5", "pair_exit")):
        with pytest.raises(
            ValueError, match=f"`{setting}` must be left out for {name}, which goes through its own, got 1"
        ):
            reproduce(name, replace(text, settings={**text.settings, setting: 1}))
    with pytest.raises(ValueError, match="`tasks` must be left out for table8, which is on images, got sst-2"):
        reproduce("table8", text)
    with pytest.raises(ValueError, match=r"`name` must be one of .* got 'table7'"):
        reproduce("table7", text)
    with pytest.raises(ValueError, match="`task` must be one of"):
        replace(text, tasks=("sst-3",))


def test_other_settings_are_other_runs(text, images):
    one = text.run(text.text("ml", "sst-2", 0)).folder
    assert one.parent.name == "sst-2"
    assert one.name.startswith("ml-")
    assert one.name.endswith("-seed0")
    assert text.run(text.text("ml", "sst-2", 0, alpha=0.3)).folder == one
    assert text.run(text.text("ml", "sst-2", 0, alpha=0.5)).folder != one
    assert text.run(text.text("kd:pcgrad", "sst-2", 0)).folder.name.startswith("kd-pcgrad-")
    elsewhere = replace(images, settings={**images.settings, "data": "/elsewhere/shades.npz"})
    assert elsewhere.run(elsewhere.images("ml", 0)).folder != images.run(images.images("ml", 0)).folder
