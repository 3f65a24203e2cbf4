"""The benchmarks' own logic: the work is real, the comparison fair, a failure a line in the table, the ratios right."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from benchmarks import command_line, gramian, memory, models, plots, scaling, tables, timing, ways
from gradalign import GradientAligner
from gradalign.errors import GradAlignError
from gradalign.rules import PCGrad

TINY_BERT = {"shape": (4, 6), "layers": 2, "width": 16, "heads": 2, "vocabulary": 30, "positions": 8}
TINY = {
    "bert": lambda groups: models.bert(groups, **TINY_BERT),
    "bert in bfloat16": lambda groups: models.bert(groups, autocast=torch.bfloat16, **TINY_BERT),
    "resnet": lambda groups: models.resnet(groups, batch=4, depth=8),
    "mlp": lambda groups: models.mlp(groups, batch=8, layers=4, width=8, num_exits=2),
}
PEER_PCGRAD = [name for name in ways.WAYS if name.startswith(ways.PEERS) and "PCGrad" in name]


def tiny(name="mlp", groups=models.pair):
    return TINY[name](groups)


def at_odds(logits, labels):
    """Two losses that conflict: one wants the labels, the other mostly does not."""
    losses = models.pair(logits, labels)
    return {"ce": losses["ce"], "against": losses["kd"] - 0.5 * losses["ce"]}


def gradients(workload):
    return [parameter.grad for parameter in workload.parameters]


def made(name, workload):
    built, failed = ways.make([name], workload)
    if failed and name.startswith(ways.PEERS):
        pytest.skip(f"{name}: {failed[name]}")
    assert not failed
    return built[name]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("groups", [models.pair, models.each_exit], ids=["pair", "exits"])
def test_losses_are_finite_and_reach_every_parameter(name, groups):
    workload = tiny(name, groups)
    losses = workload.losses()
    assert len(losses) == (2 if groups is models.pair else len(workload.logits()))
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients(workload))
    assert workload.gradient_bytes == 4 * sum(parameter.numel() for parameter in workload.parameters)


def test_a_probe_is_the_auxiliary_on_a_quarter_of_the_rows():
    workload = tiny()
    seen = []
    workload.model.register_forward_pre_hook(lambda model, inputs: seen.append(len(inputs[0])))
    (anchor,), (auxiliary,) = workload.anchor_loss(), workload.probe()
    assert (anchor, auxiliary, seen) == ("ce", "kd", [8, 2])
    assert workload.has_probe
    assert not tiny(groups=models.each_exit).has_probe


def test_shares_of_exits_are_means_of_neighbours():
    workload = models.mlp(models.shares_of_exits(2), batch=8, layers=4, width=8, num_exits=4)
    exits = models.each_exit(workload.logits(), workload.labels)
    losses = workload.losses()
    assert_close(losses["share1"], (exits["exit1"] + exits["exit2"]) / 2)
    assert_close(losses["share2"], (exits["exit3"] + exits["exit4"]) / 2)


def test_the_small_bert_has_the_parameters_that_the_page_says():
    with torch.device("meta"):
        model = models.MultiExitBERT()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 22.7


def test_an_accelerator_takes_bert_base_too():
    assert not [name for name in models.cases("cpu") if "base" in name]
    assert models.cases("cuda") == list(models.CASES)


@pytest.mark.filterwarnings("ignore")  # a peer's own
@pytest.mark.parametrize("name", PEER_PCGRAD)
@pytest.mark.parametrize("groups", [at_odds, models.each_exit], ids=["conflict", "heads of their own"])
def test_a_peer_does_the_work_of_ours(name, groups):
    workload = tiny(groups=groups)
    aligner = GradientAligner(workload.inner, PCGrad())
    aligner.backward(workload.losses())
    assert groups is models.each_exit or aligner.report.conflicts
    ours = gradients(workload)
    workload.clear()
    made(name, workload).backward(workload.losses())
    # The peers multiply gradients in float32.
    assert_close(gradients(workload), ours, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ways.WAYS)
@pytest.mark.parametrize("zero_late", [False, True])
def test_a_way_changes_the_parameters(name, zero_late):
    workload = tiny()
    way = made(name, workload)
    way.zero_late = zero_late
    before = [parameter.detach().clone() for parameter in workload.parameters]
    way()
    assert any(not torch.equal(a, b) for a, b in zip(before, workload.parameters, strict=True))
    assert all(parameter.isfinite().all() for parameter in workload.parameters)


def test_the_floor_leaves_each_parameter_the_last_gradient_that_reaches_it():
    workload = tiny(groups=models.each_exit)
    ways.Floor(workload).backward(workload.losses())
    first, last = workload.losses().values()
    of_first = torch.autograd.grad(first, workload.parameters, retain_graph=True, allow_unused=True)
    of_last = torch.autograd.grad(last, workload.parameters, allow_unused=True)
    expected = [a if b is None else b for a, b in zip(of_first, of_last, strict=True)]
    assert_close(gradients(workload), expected)


def test_some_ways_are_for_some_workloads():
    names = ["floor", "probed GASoft", "stacked GASoft, propagate"]
    workload = tiny()
    assert ways.suitable(names, workload) == ["floor", "probed GASoft"]
    assert ways.suitable(names, tiny(groups=models.each_exit)) == ["floor"]
    workload.inputs = workload.inputs.to("meta")
    assert ways.suitable(names, workload) == names


def test_a_way_that_cannot_be_made_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "conflictfree.utils", None)
    built, failed = ways.make(["conflictfree PCGrad", "joint"], tiny())
    assert list(built) == ["joint"]
    assert failed["conflictfree PCGrad"].startswith(("ImportError: ", "ModuleNotFoundError: "))


def test_a_call_that_fails_is_reported_and_the_others_go_on():
    cleaned = []

    def breaks():
        raise GradAlignError("first line\nsecond line")

    figures = timing.measure(
        {"broken": breaks, "fine": lambda: None}, rounds=2, references=("fine",), clean_up=lambda: cleaned.append(1)
    )
    assert figures["broken"] == {"failed": "GradAlignError: first line"}
    assert len(figures["fine"]["rounds"]) == 2
    assert cleaned == [1]


def test_a_call_that_fails_in_a_later_round_has_no_figures():
    left = iter([None, None])
    figures = timing.measure({"tires": lambda: next(left), "fine": lambda: None}, rounds=4)
    assert figures["tires"] == {"failed": "StopIteration: "}
    assert len(figures["fine"]["rounds"]) == 4


def test_a_failure_is_one_short_line_without_folders():
    shown = timing.failure(ValueError(f"no name 'x' in 'y' (/some/where/site-packages/y.py) {'z' * 200}"))
    assert shown.startswith("ValueError: no name 'x' in 'y' (y.py) zzz")
    assert len(shown) == 160


def test_calls_take_turns_there_and_back():
    order = []
    timing.measure({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2)
    assert order == [*"abc", *"abc", *"cba"]  # the first of all are not timed


def test_a_slow_call_takes_part_in_three_rounds():
    figures = timing.measure(
        {"reference": lambda: None, "slow": lambda: time.sleep(1e-3)}, rounds=5, references=("reference",), budget=1e-6
    )
    assert [len(figures[name]["rounds"]) for name in ("reference", "slow")] == [5, 3]


def test_a_call_of_several_steps_counts_for_one(monkeypatch):
    clock = iter([10.0, 18.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def four():
        pass

    four.steps = 4
    assert timing.seconds(four, "cpu") == 2.0


def test_ratios_are_taken_within_a_round():
    # The machine halves its speed after the first round: medians of times would say 3 / 2, the rounds say 2, 1.5, 1.5.
    times = {"floor": [1.0, 2.0, 2.0], "way": [2.0, 3.0, 3.0]}
    assert timing.figures("way", times, ("floor", "joint")) == {
        "seconds": 3.0,
        "of floor": 1.5,
        "rounds": [2.0, 3.0, 3.0],
    }


def test_what_is_held_is_counted_from_joint_training():
    joint = {"bytes": 10 * memory.MIB, "gradient bytes": 2 * memory.MIB}
    figures = memory.over_joint({"bytes": 13 * memory.MIB, "collector": "stacked"}, joint)
    assert figures == {"MiB": 13.0, "MiB over joint": 3.0, "P over joint": 1.5, "collector": "stacked"}
    assert memory.over_joint({"failed": "why"}, joint) == {"failed": "why"}


def test_a_process_says_how_it_ended(monkeypatch):
    ended = SimpleNamespace(returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(memory.subprocess, "run", lambda *arguments, **options: ended)
    options = memory.parser().parse_args([])
    assert memory.in_a_process(options, "bert", "joint", next(iter(memory.ORDERS))) == {
        "failed": "exit status -9: no message"
    }


def test_a_child_measures_itself():
    outcome = memory.child(tiny(), "stacked GASoft", "cpu", zero_late=True)
    assert outcome["bytes"] > 0
    assert outcome["K"] == 2
    assert memory.child(tiny(groups=models.each_exit), "probed GASoft", "cpu", zero_late=True) == {"unsuitable": True}


def test_share_of_copy_bandwidth():
    # Reading J alone moves half of what a copy moves: as long as a copy, it is half as fast.
    J = torch.ones(2, 50)
    assert gramian.share_of_copy({"of copy": 1.0}, J) == 0.5
    assert gramian.share_of_copy({"of copy": 0.5}, J) == 1.0


def test_parts_are_the_same_elements():
    J = torch.randn(3, 5000)
    parts = gramian.in_parts(J)
    assert_close(torch.stack([torch.cat(row) for row in parts]), J)
    assert len(parts[0]) > 10
    assert [part.numel() for part in parts[0]] == [part.numel() for part in parts[2]]


def test_gramians_are_compared_with_an_exact_one():
    figures = gramian.case(2, 5000, 1, "cpu")
    assert "relative error" not in figures["copy"]
    assert figures["gradalign"]["relative error"] < 1e-12 < figures["J @ J.T"]["relative error"] < 1e-5


def test_too_many_rows_are_not_tried(monkeypatch):
    monkeypatch.setattr(gramian, "free_bytes", lambda device: 0)
    (reason,) = gramian.case(2, 100, 1, "cpu").values()
    assert reason["failed"].endswith("GiB of free memory")


RECORD = {
    "command": "python benchmarks/x.py",
    "commit": "abc",
    "device name": "a CPU",
    "machine": "x86_64",
    "torch": "2",
    "peers": {"torchjd": "0.18", "LibMTL": "not installed"},
    "rounds": 2,
}
CASES = {
    "step_overhead": {
        "mlp": {
            "title": "MLP",
            "ways": {
                "floor": {"seconds": 0.25, "of floor": 1.0, "of joint": 2.0},
                "LibMTL PCGrad": {"failed": "ImportError: `x`"},
            },
        }
    },
    "memory": {
        "mlp": {
            "title": "MLP",
            "K": 2,
            "gradient bytes": 2**20,
            "orders": {
                "first": {"joint": {"MiB over joint": 0.0, "P over joint": 0.0}, "floor": {"failed": "why"}},
                "second": {"joint": {"MiB over joint": 1.0, "P over joint": 0.25}, "floor": {"failed": "why"}},
            },
        }
    },
    "gramian": [
        {
            "K": 2,
            "P": 4096,
            "calls": {
                "copy": {"seconds": 1.0},
                "J @ J.T": {"seconds": 0.001, "share of copy bandwidth": 0.5, "relative error": 1e-7},
                "gradalign": {"failed": "why"},
            },
        }
    ],
    "scaling": {
        "K": [{"K": 2, "ways": {"floor": {"seconds": 0.5}, "joint": {"of floor": 0.5}, "lost": {"failed": "why"}}}]
    },
}
EXPECTED = {
    "step_overhead": ["MLP:", "| floor | 250.0 | 1.00 | 2.00 |", "- LibMTL PCGrad: `` ImportError: `x` ``"],
    "memory": ["MLP, K = 2, P = 1.0 MiB:", "| joint | 0 (0.00) | 1 (0.25) |", "- floor: `` why ``"],
    "gramian": ["| 4,096 | 2 | 1 ms, 50 %, 1e-07 | failed |", "- gradalign, P = 4,096, K = 2: `` why ``"],
    "scaling": ["| the floor, ms | 500.0 |", "| joint | 0.50 |", "- lost: `` why ``"],
}


@pytest.fixture
def results(tmp_path):
    for name, cases in CASES.items():
        content = json.dumps({"benchmark": name, **RECORD, "cases": cases})
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", tables.BENCHMARKS)
def test_tables_hold_the_figures_and_how_they_were_made(results, name):
    page = tables.sections(name, results / "page.md", results)
    for line in [*EXPECTED[name], RECORD["command"], "commit abc, a CPU, x86_64, torch 2, torchjd 0.18; median of 2"]:
        assert line in page


def test_tables_go_to_their_place_and_can_be_written_again(results):
    text = "".join(f"\n<!-- {name} -->\nold\n<!-- end of {name} -->\nafter\n" for name in tables.BENCHMARKS)
    once = tables.filled(text, results / "page.md", results)
    assert "old" not in once
    assert once.count("after") == 4
    assert tables.filled(once, results / "page.md", results) == once
    with pytest.raises(ValueError, match="must hold <!-- step_overhead --> and"):
        tables.filled("", results / "page.md", results)


def test_plots_are_written(tmp_path):
    curves = scaling.curves(CASES["scaling"]["K"], "K")
    assert curves == {"joint": [(2, 0.5)]}
    plots.curves(tmp_path / "curves.png", {"K": curves}, ["K"], "of the floor", log=True)
    plots.bars(tmp_path / "bars.png", {"one": {"floor": 1.0, "other": 9.0}}, "of the floor", line=1.0, most=3.0)
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("curves", "bars"))


def test_results_of_an_accelerator_lie_beside_the_others(tmp_path):
    made = command_line.parser("Text.", 9)
    assert command_line.rounds(made.parse_args(["--device", "cpu"])) == 9
    options = made.parse_args(["--device", "cuda:0", "--out", str(tmp_path), "--quick"])
    assert command_line.rounds(options) == command_line.QUICK_ROUNDS
    assert command_line.save(options, "x", {"a": 1}) == tmp_path / "x-cuda.png"
    assert json.loads((tmp_path / "x-cuda.json").read_text(encoding="utf-8")) == {"a": 1}
    assert command_line.save(made.parse_args([]), "x", {}) is None
