from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from gradalign.multiexit.configs import TextConfig
from gradalign.multiexit.runs import Run
from gradalign.multiexit.search import PAPERS_GRID, search, trials_of
from gradalign.multiexit.text.workload import TextWorkload
from tests.multiexit.text.folders import backbone, glue

GRID = {"learning_rate": [1e-3, 3e-3], "alpha": [0.1, 0.5]}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return TextConfig(
        task="sst-2",
        backbone=str(backbone(folder / "encoder", layers=2)),
        data_dir=str(glue(folder / "glue", train=40, dev=10)),
        epochs=1,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def searched(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "out"
    return folder, list(search(config, trials_of(GRID), 2, folder))


def test_a_trial_is_a_row(config, searched):
    folder, trials = searched
    assert [trial.settings for trial in trials] == [
        {"learning_rate": 1e-3, "alpha": 0.1},
        {"learning_rate": 1e-3, "alpha": 0.5},
        {"learning_rate": 3e-3, "alpha": 0.1},
        {"learning_rate": 3e-3, "alpha": 0.5},
    ]
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert lines == [asdict(trial) for trial in trials]
    for number, trial in enumerate(trials):
        assert trial.number == number
        runs = [Run.open(folder / f"trial-{number:03}" / f"fold-{fold}") for fold in range(2)]
        assert [run.config for run in runs] == [
            replace(config, **trial.settings, folds=2, fold=fold) for fold in range(2)
        ]
        # a trial's score is that of the held-out rows, mean over the two exits
        assert trial.scores == pytest.approx([sum(run.result["held_out_accuracy"]) / 2 for run in runs])
        assert trial.mean == pytest.approx(sum(trial.scores) / 2)
        assert trial.seconds == pytest.approx(sum(run.result["seconds"] for run in runs))
        assert trial.steps == 3  # 20 rows in batches of 8


def test_folds_are_disjoint_and_cover_the_training_rows(config):
    parts = [TextWorkload(replace(config, folds=3, fold=fold), torch.device("cpu")) for fold in range(3)]
    assert sum(len(part.held_out) for part in parts) == 40
    for part in parts:
        assert len(part.train) + len(part.held_out) == 40
    whole = TextWorkload(config, torch.device("cpu"))

    def texts(*splits):
        return sorted(
            tuple(split.columns["input_ids"][start : start + length].tolist())
            for split in splits
            for start, length in zip(split.starts.tolist(), split.lengths.tolist(), strict=True)
        )

    assert texts(*(part.held_out for part in parts)) == texts(whole.train, whole.held_out)
    for part in parts:
        assert texts(part.train, part.held_out) == texts(whole.train, whole.held_out)


def test_development_rows_play_no_part(config, searched, tmp_path):
    folder, trials = searched
    other = glue(tmp_path / "glue", train=40, dev=10)
    dev = other / "SST-2" / "dev.tsv"
    head, *lines = dev.read_text().splitlines()
    dev.write_text("\n".join([head, *(line[:-1] + "1" for line in lines)]) + "\n")  # they were half and half
    settings = trials_of(GRID)[:1]
    (again,) = search(replace(config, data_dir=str(other)), settings, 2, tmp_path / "out")
    assert again.scores == trials[0].scores
    run, before = Run.open(tmp_path / "out/trial-000/fold-0"), Run.open(folder / "trial-000/fold-0")
    assert run.result["test_accuracy"] != before.result["test_accuracy"]


def test_a_second_call_trains_nothing(config, searched):
    folder, trials = searched
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*")}
    assert list(search(config, trials_of(GRID), 2, folder)) == trials
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*")} == before


def test_a_stopped_search_goes_on(config, searched, tmp_path):
    _, trials = searched
    first = search(config, trials_of(GRID), 2, tmp_path)
    assert without_seconds(next(first)) == without_seconds(trials[0])
    first.close()
    assert without_seconds(*search(config, trials_of(GRID), 2, tmp_path)) == without_seconds(*trials)


def without_seconds(*trials):
    return [replace(trial, seconds=0.0) for trial in trials]


def test_networks_and_checkpoints_are_removed(searched):
    folder, _ = searched
    names = {path.name for path in folder.glob("*/*/*")}
    assert names == {"config.json", "metrics.jsonl", "logits.safetensors", "result.json"}


def test_another_search_in_the_folder_is_refused(config, searched):
    folder, _ = searched
    with pytest.raises(
        ValueError, match=r"`out` must be a folder whose runs have this configuration, got .* alpha=0.1"
    ):
        list(search(config, [{"alpha": 0.7, "learning_rate": 1e-3}], 2, folder))


def test_settings_are_checked_before_any_training(config, tmp_path):
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got 3"):
        list(search(config, [{"alpha": 0.1}, {"alpha": 3.0}], 2, tmp_path / "out"))
    with pytest.raises(ValueError, match="`folds` must be at least 2, got 1"):
        list(search(config, [{"alpha": 0.1}], 1, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_some_trials_are_a_fixed_random_part():
    every = trials_of(PAPERS_GRID)
    assert len(every) == len({tuple(trial.values()) for trial in every}) == 3 * 4 * 3 * 5
    some = trials_of(PAPERS_GRID, 20)
    assert some == trials_of(PAPERS_GRID, 20)
    assert len({tuple(trial.values()) for trial in some}) == 20
    assert all(trial in every for trial in some)
    assert some != trials_of(PAPERS_GRID, 20, seed=1)
    assert some != every[:20]
    assert trials_of(PAPERS_GRID, 500) == every


def test_an_empty_grid_is_named():
    with pytest.raises(
        ValueError, match=r"`grid` must hold one value at least for each setting, got none for \['alpha'\]"
    ):
        trials_of({"alpha": [], "beta": [1]})
    with pytest.raises(ValueError, match="got none for any"):
        trials_of({})
    with pytest.raises(ValueError, match="`trials` must be at least 1, got 0"):
        trials_of(GRID, 0)


def test_a_setting_that_diverges_is_told_of_and_the_others_go_on(config, tmp_path, capsys):
    trials = list(search(config, trials_of({"learning_rate": [1e30, 3e-3]}), 2, tmp_path))
    assert trials[0].mean is None
    assert trials[1].mean is not None
    said = capsys.readouterr().err
    assert f"{config.method} on sst-2 seed 0 fold 1 of 2 diverged" in said
    assert f"{config.method} on sst-2 seed 0 fold 2 of 2 diverged" in said
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert lines == [asdict(trial) for trial in trials]
