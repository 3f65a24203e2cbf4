from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from gradalign.multiexit import training
from gradalign.multiexit.configs import TextConfig
from gradalign.multiexit.runs import Run
from gradalign.multiexit.text.workload import MODEL, TextWorkload, learning_rate
from gradalign.multiexit.training import Interrupted, train
from tests.multiexit.spies import interrupting, same_files
from tests.multiexit.text.folders import backbone, glue


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What all runs share: 54 training rows and 10 held out in 7 batches an epoch, dropout 0.1."""
    folder = tmp_path_factory.mktemp("text")
    return TextConfig(
        task="sst-2",
        backbone=str(backbone(folder / "encoder")),
        data_dir=str(glue(folder / "glue")),
        method="ml",
        epochs=2,
        batch_size=8,
        learning_rate=3e-3,
    )


def work(config):
    return TextWorkload(config, torch.device("cpu"))


def trained(folder, config):
    run = Run(folder).prepared(config)
    train(run, work(config))
    return run


def rows_taken(monkeypatch):
    """A list that grows by the row numbers of each batch that is made."""
    taken, inputs = [], TextWorkload._inputs

    def seen(self, split, rows):
        taken.append(rows)
        return inputs(self, split, rows)

    monkeypatch.setattr(TextWorkload, "_inputs", seen)
    return taken


@pytest.mark.parametrize("buckets", [True, False])
def test_an_epoch_has_every_row_once(small, buckets, monkeypatch):
    workload = work(replace(small, buckets=buckets))
    taken = rows_taken(monkeypatch)
    for step in range(2 * workload.steps_an_epoch):
        workload.batch(step, 0, 1)
    first, second = torch.cat(taken[:7]), torch.cat(taken[7:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(54))
    assert first.tolist() != second.tolist()


def test_a_batch_depends_on_configuration_and_number_alone(small):
    ahead, there = work(small), work(small)
    for step in range(10):
        ahead.batch(step, 0, 1)
    torch.rand(3)
    for step in (9, 2):
        one, two = ahead.batch(step, 0, 1), there.batch(step, 0, 1)
        assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
        assert torch.equal(one[1], two[1])
    other = work(replace(small, seed=1))
    assert any(
        one.shape != two.shape or not torch.equal(one, two)
        for one, two in ((ahead.batch(k, 0, 1)[0]["input_ids"], other.batch(k, 0, 1)[0]["input_ids"]) for k in range(7))
    )


def test_the_parts_of_ranks_make_the_batch(small, monkeypatch):
    workload = work(small)
    taken = rows_taken(monkeypatch)
    for step in range(workload.steps_an_epoch):
        taken.clear()
        workload.batch(step, 0, 1)
        shares = [workload.batch(step, rank, 3)[2] for rank in range(3)]
        whole, *parts = [rows.tolist() for rows in taken]
        assert sorted(row for part in parts for row in part) == sorted(whole)
        assert shares == pytest.approx([len(part) / len(whole) for part in parts])
        assert sum(shares) == pytest.approx(1)


def test_a_rank_without_rows_counts_nothing(small):
    workload = work(replace(small, batch_size=53))  # the second batch has one row
    sizes = {len(workload.batch(step, 0, 1)[1]): step for step in range(2)}
    step = sizes[1]
    assert [workload.batch(step, rank, 2)[2] for rank in range(2)] == [1.0, 0.0]
    assert len(workload.batch(step, 1, 2)[1]) == 1


def test_logits_are_in_the_order_of_the_rows(small):
    workload = work(small)
    model = workload.make_model()
    logits, labels = workload.logits(model.train(), "test")
    assert model.training
    assert logits.shape == (3, 40, 2)
    assert torch.equal(labels, workload.test.labels)
    assert len(set(workload.test.lengths.tolist())) > 1
    with torch.no_grad():
        for number, row in enumerate(workload.rows("test", 40)):
            torch.testing.assert_close(logits[:, number], model.eval()(**row)[:, 0])
    assert number == 39


def test_costs_are_means_over_development_rows(small):
    workload = work(small)
    model = workload.make_model()
    lengths = workload.test.lengths.tolist()
    of_exits = torch.tensor([model.exit_macs(length) for length in lengths], dtype=torch.float64).mean(0)
    bare = torch.tensor([model.exit_macs(n, heads=False)[-1] for n in lengths], dtype=torch.float64).mean()
    costs = workload.costs(model)
    assert costs.exits == pytest.approx(of_exits.tolist())
    heads = torch.tensor([[head.macs(n) for head in model.heads] for n in lengths], dtype=torch.float64).mean(0)
    pooler = 0 if model.pooler is None else model.pooler.dense.weight.numel()
    assert costs.heads == pytest.approx((heads[:-1] + pooler).tolist())
    assert costs.bare == pytest.approx(float(bare))
    assert workload.whole() == (3, pytest.approx(float(bare)))


def test_what_is_saved_is_loaded_to_the_bit(small, tmp_path):
    workload = work(small)
    model = workload.make_model()
    (tmp_path / f"{MODEL}.new").mkdir()
    (tmp_path / f"{MODEL}.new" / "half").touch()  # a save that was killed
    workload.save(model, tmp_path)
    loaded = workload.load(tmp_path)
    assert not loaded.training
    assert loaded.config.id2label == {0: "negative", 1: "positive"}
    assert loaded.config.label2id == {"negative": 0, "positive": 1}
    ids = workload.tokenizer("the good film")["input_ids"]
    assert loaded.tokenizer("the good film")["input_ids"] == ids
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.nn.init.ones_(next(model.heads[0].parameters()))
    (tmp_path / MODEL / "left over").touch()
    workload.save(model, tmp_path)
    assert all(torch.equal(t, workload.load(tmp_path).state_dict()[name]) for name, t in model.state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} == {MODEL}
    assert not {"half", "left over"} & {path.name for path in (tmp_path / MODEL).iterdir()}


def test_weight_decay_is_for_matrices(small):
    model = work(small).make_model()
    optimizer = work(replace(small, weight_decay=0.125)).make_optimizer(model.parameters(), 0.5)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {(p.ndim > 1, decay[id(p)]) for p in model.parameters()} == {(True, 0.125), (False, 0.0)}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_warm_up_is_in_epochs_and_decay_linear(small):
    workload = work(replace(small, warm_up=2.0, learning_rate=0.5))
    assert workload.steps_an_epoch == 7
    rates = [workload.learning_rate(step, 35) for step in range(35)]
    # 14 steps up to 0.5, then 21 down, of which the last is 0.5 / 21
    assert rates == pytest.approx([*(0.5 * (k + 1) / 14 for k in range(14)), *(0.5 * (21 - k) / 21 for k in range(21))])
    assert learning_rate(1.0, 0, 0, 4) == 1.0
    assert learning_rate(1.0, 9, 3, 4) == 1.0  # it grows to the end


def test_new_exits_depend_on_the_seed_alone(small):
    before = torch.get_rng_state()
    one = work(small).make_model().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    two = work(small).make_model().state_dict()
    other = work(replace(small, seed=1)).make_model().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    differ = {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert differ == {"heads"}  # backbone and pooler are the pretrained ones
    new = work(replace(small, pretrained=False)).make_model().state_dict()
    name = "backbone.embeddings.word_embeddings.weight"
    assert not torch.equal(one[name], new[name])
    assert torch.equal(new[name], work(replace(small, pretrained=False)).make_model().state_dict()[name])


def test_a_missing_backbone_is_named_in_a_line(small, tmp_path):
    with pytest.raises(ValueError, match=r"`backbone` must be a folder with an encoder .*, got '.*': ") as raised:
        work(replace(small, backbone=str(tmp_path)))
    assert "\n" not in str(raised.value)


def test_a_run_learns_and_draws_from_no_global_generator(small, tmp_path):
    before = torch.get_rng_state()
    run = trained(tmp_path / "run", replace(small, epochs=6))
    assert torch.equal(torch.get_rng_state(), before)
    assert max(run.result["test_accuracy"]) >= 0.8
    assert len(list(run.metrics("step"))) == run.result["steps"] == 42


@pytest.mark.parametrize("method", ["gaml-soft", "fastbert"])
def test_ctrl_c_leaves_a_checkpoint_that_goes_on_bit_for_bit(small, method, tmp_path, monkeypatch):
    config = replace(small, method=method)
    whole = trained(tmp_path / "whole", config)
    run = Run.create(tmp_path / "stopped", config)
    interrupting(monkeypatch, (3, 11, 18))
    for done in (4, 12, 19)[: 2 if method == "gaml-soft" else 3]:
        with pytest.raises(Interrupted, match=f"stopped after step {done}"):
            train(run, work(config))
    train(run, work(config))
    assert same_files(whole, run, f"{MODEL}/model.safetensors")


def test_patience_keeps_the_best_network(small, tmp_path, monkeypatch):
    """The held-out scores of the epochs are made up: the second is the best, two more are not better."""
    means, states = iter([0.4, 0.9, 0.9, 0.5, 0.9, 0.9]), []

    def scores(self, logits, labels):
        return {"accuracy": torch.full((3,), next(means))}

    monkeypatch.setattr(TextWorkload, "scores", scores)
    end = training._Training._end_epoch

    def seen(self, bar):
        states.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        end(self, bar)

    monkeypatch.setattr(training._Training, "_end_epoch", seen)
    config = replace(small, epochs=6, patience=2)
    run = trained(tmp_path / "run", config)
    assert run.result["steps"] == 4 * 7
    kept = work(config).load(run.folder).state_dict()
    assert all(torch.equal(states[1][name], kept[name]) for name in kept)
    assert not all(torch.equal(states[3][name], kept[name]) for name in kept)


def test_without_patience_the_last_network_is_kept(small, tmp_path):
    run = trained(tmp_path / "run", replace(small, patience=None))
    (*_, last) = run.metrics("epoch")
    assert last["held_out_accuracy"] == run.result["held_out_accuracy"]
    assert run.result["steps"] == 14


def test_clip_bounds_the_aligned_gradient(small, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def seen(self, *arguments):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    trained(tmp_path / "clipped", replace(small, epochs=1, clip=0.01))
    assert norms == pytest.approx([0.01] * 7, rel=1e-3)
    norms.clear()
    trained(tmp_path / "free", replace(small, epochs=1, clip=None))
    assert min(norms) > 0.01


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "bfloat16"},
        {"granularity": "layer"},
        {"granularity": "tensor"},
        {"scope": "trunk"},
        {"exit": "deebert", "granularity": "layer", "method": "deebert"},
    ],
    ids=lambda changed: "-".join(map(str, changed.values())),
)
def test_settings_of_training(small, changed, tmp_path):
    run = trained(tmp_path / "run", replace(small, **{"method": "gaml-soft", "epochs": 1, **changed}))
    step = next(run.metrics("step"))
    assert run.finished
    blocks = {"layer": 3, "tensor": len(list(work(run.config).make_model().parameters()))}
    if run.config.granularity in blocks:  # of deebert's frozen network the last layer's exit alone trains in stage 2
        for number in range(len(run.result["stages"])):
            of_stage = next(line for line in run.metrics("step") if line["stage"] == number + 1)
            expected = blocks[run.config.granularity] - (number if run.config.method == "deebert" else 0)
            assert len(of_stage["weights"]) == expected
    if changed.get("precision") == "bfloat16":
        exact = trained(tmp_path / "exact", replace(run.config, precision="float32"))
        one, two = next(run.metrics("step"))["losses"], next(exact.metrics("step"))["losses"]
        assert one != two
        assert one == pytest.approx(two, rel=0.05)
        assert run.logits("test")[0].dtype == torch.float32
    if changed.get("scope") == "trunk":  # over other parameters the angle is another
        everything = trained(tmp_path / "all", replace(run.config, scope="all"))
        assert next(everything.metrics("step"))["angles"] != step["angles"]


def test_regression(small, tmp_path):
    run = trained(tmp_path / "run", replace(small, task="sts-b", epochs=3))
    logits, labels = run.logits("test")
    assert logits.shape == (3, 40, 1)
    assert labels.dtype == torch.float32
    assert run.result["main"] == "pearson_and_spearman"
    steps = list(run.metrics("step"))
    assert steps[0]["accuracy"] is None
    assert steps[-1]["losses"]["ce"] < steps[0]["losses"]["ce"]
    assert work(run.config).load(run.folder).config.num_labels == 1


def test_two_sentences_and_their_mean_score(small, tmp_path):
    run = trained(tmp_path / "run", replace(small, task="mrpc", epochs=1))
    result = run.result
    means = [(a + f) / 2 for a, f in zip(result["test_accuracy"], result["test_f1"], strict=True)]
    assert result["test_accuracy_and_f1"] == pytest.approx(means)
    assert "token_type_ids" in work(run.config).batch(0, 0, 1)[0]


def test_a_checkpoint_in_half_precision_is_trained_in_single(small, tmp_path):
    source = AutoModel.from_pretrained(small.backbone).to(torch.bfloat16)
    source.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(small.backbone).save_pretrained(tmp_path)
    model = work(replace(small, backbone=str(tmp_path))).make_model()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(model.backbone.get_parameter(name), source.get_parameter(name).float())


def test_longer_rows_than_the_backbone_takes_are_refused(small, tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    (folder / "train.tsv").write_text("sentence\tlabel\n" + f"{'good ' * 100}\t1\n" * 9)
    (folder / "dev.tsv").write_text("sentence\tlabel\nbad\t0\n")
    with pytest.raises(
        ValueError, match=r"`max_length` must be at most \d\d, what the backbone takes, got rows of 102"
    ):
        work(replace(small, data_dir=str(tmp_path)))
