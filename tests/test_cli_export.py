from __future__ import annotations

import random
import shutil

import pytest
from transformers import AutoModel

from gradalign import cli
from gradalign.multiexit import MultiExitEncoder, metrics, policies
from gradalign.multiexit.configs import ImageConfig
from gradalign.multiexit.evaluation import POLICIES, policy_of
from gradalign.multiexit.runs import Run
from tests.multiexit.text import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on texts that are good or bad by one word, and the texts of the development rows."""
    folder = tmp_path_factory.mktemp("export")
    words, draw = ["a", "the", "film", "plot", "is", "was", "very"], random.Random(0)
    (folder / "SST-2").mkdir()
    texts = {}
    for split, count in (("train", 60), ("dev", 24)):
        labels = ("good", "bad") * (count // 2)
        rows = [(" ".join([*draw.choices(words, k=4), label]), int(label == "good")) for label in labels]
        texts[split] = [text for text, _ in rows]
        (folder / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows))
    (folder / "backbone").mkdir()
    AutoModel.from_config(tiny.CONFIGS["bert"]).save_pretrained(folder / "backbone")
    tiny.tokenizer(folder / "backbone")
    options = ["--task", "sst-2", "--data-dir", str(folder), "--backbone", str(folder / "backbone"), "--epochs", "6"]
    options += ["--learning-rate", "0.003", "--batch-size", "8", "--method", "joint"]
    assert cli.main(["train", *options, "--out", str(folder / "run")]) == 0
    return folder / "run", texts["dev"]


@pytest.mark.parametrize("name", POLICIES)
def test_a_network_is_served_with_its_policy(trained, name, tmp_path, capsys):
    folder, texts = trained
    out = tmp_path / "served"
    assert cli.main(["export", str(folder), "--policy", name, "--speed-up", "1.5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "x in layers, the nearest to 1.5x that there is" in printed
    run, model = Run.open(folder), MultiExitEncoder.from_pretrained(out)
    policy = policies.from_dict(model.config.policy)
    held_out = run.logits("held_out")
    assert policy == policies.calibrate(policy_of(name, held_out), held_out[0], 1.5)
    logits, labels = run.logits("test")
    decision = policy.decide(logits)
    found = model.predict(texts)
    assert [answer.exit for answer in found] == decision.exits.tolist()
    assert [answer.label for answer in found] == [("negative", "positive")[label] for label in decision.labels.tolist()]
    accuracy = float((decision.labels == labels).double().mean())
    assert f"accuracy {accuracy:.3f} at {metrics.speed_up(decision.exits, 3):.2f}x in layers" in printed


def test_what_makes_no_sense_is_named(trained, tmp_path, capsys):
    folder, _ = trained
    assert cli.main(["export", str(folder), "--out", str(tmp_path)]) == 1
    assert "`--out` must be a folder that is not there yet" in capsys.readouterr().err
    Run.create(tmp_path / "images", ImageConfig(depth=8))
    assert cli.main(["export", str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 1
    assert "`run` must be one on text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_network_with_one_exit_takes_no_policy(trained, tmp_path, capsys):
    folder, _ = trained
    options = ["--task", "sst-2", "--data-dir", str(folder.parent), "--backbone", str(folder.parent / "backbone")]
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["train", *options, "--epochs", "1", "--method", "layerdrop", "--out", str(run)]) == 0
    assert cli.main(["export", str(run), "--policy", "entropy", "--out", str(out)]) == 1
    assert "`--policy` must be left out for a network with one exit, got entropy" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    assert MultiExitEncoder.from_pretrained(out).predict(["a film"])[0].exit == 1


def test_a_run_without_its_network_is_named(trained, tmp_path, capsys):
    folder, _ = trained
    copy = shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(copy / "model")
    assert cli.main(["export", str(copy), "--out", str(tmp_path / "out")]) == 1
    assert "`run` must hold its network, got" in capsys.readouterr().err
