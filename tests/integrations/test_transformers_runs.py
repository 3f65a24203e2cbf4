"""AlignedTrainer around the training: checkpoints, logs, evaluation, ranks, misuse, and the page that shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from gradalign import GradientAligner
from gradalign.integrations.transformers import AlignedTrainer, AlignedTrainerMixin
from tests.distributed import processes
from tests.integrations.small_bert import (
    RANKED,
    Aligned,
    Plain,
    arguments,
    bert,
    losses_of,
    parameters,
    rows,
    train_on_ranks,
    train_ranked,
    trained,
)

PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "transformers.md"
PCGRAD = {"rule": "pcgrad"}


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_gives_the_same_bits(tmp_path, accumulate):
    options = {"trainer_options": PCGRAD, "save_strategy": "steps", "save_steps": 3, "logging_steps": 3}
    options |= {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
    through = trained(Aligned, tmp_path, model=bert(dropout=0.1), **options)
    checkpoint = tmp_path / "checkpoint-3"  # within the first of two epochs of four steps
    resumed = trained(Aligned, tmp_path / "2", model=bert(seed=5, dropout=0.1), resume=str(checkpoint), **options)
    assert same_bits(parameters(resumed), parameters(through))
    assert resumed.state.log_history == [  # but for how long it took
        ours if "train_runtime" in ours else theirs
        for ours, theirs in zip(resumed.state.log_history, through.state.log_history, strict=True)
    ]

    # Without the rule's own state its draws start again, and the bits are others: the rule's state is what did it.
    shutil.copytree(checkpoint, tmp_path / "forgetful")
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert state.pop("gradalign")["rule"] == "pcgrad"
    torch.save(state, tmp_path / "forgetful" / "optimizer.pt")
    model = bert(seed=5, dropout=0.1)
    forgetful = trained(Aligned, tmp_path / "3", model=model, resume=str(tmp_path / "forgetful"), **options)
    assert not same_bits(parameters(forgetful), parameters(through))


def test_a_checkpoint_of_another_rule_is_refused(tmp_path):
    trained(Aligned, tmp_path, trainer_options=PCGRAD, max_steps=1, save_strategy="steps", save_steps=1)
    other = {"trainer_options": {"rule": "mgda"}, "resume": str(tmp_path / "checkpoint-1"), "max_steps": 2}
    with pytest.raises(ValueError, match="must come from an aligner with the rule 'mgda', got one with 'pcgrad'"):
        trained(Aligned, tmp_path, **other)


class Reports(TrainerCallback):
    def __init__(self):
        self.trainer, self.seen = None, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.trainer.aligner.report)


def watched(folder, rule, **options):
    reports, data = Reports(), rows(16)
    made = {"callbacks": [reports], "rule": rule} | options.pop("trainer_options", {})
    reports.trainer = Aligned(model=bert(), args=arguments(folder, **options), train_dataset=data, **made)
    reports.trainer.train()
    return reports


def test_the_log_holds_the_conflicts(tmp_path):
    reports = watched(tmp_path, "mgda", logging_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    first, second = (entry for entry in reports.trainer.state.log_history if "loss" in entry)
    assert len(reports.seen) == 8
    for entry, seen in ((first, reports.seen[:4]), (second, reports.seen[4:])):
        logged = {name: value for name, value in entry.items() if name.startswith("align/")}
        expected = {
            "align/conflicts": sum(len(report.conflicts) for report in seen) / 4,
            "align/reversals": sum(report.reversals for report in seen) / 4,
            "align/skipped": 0.0,
        }
        for i, one in enumerate(("ce", "kd", "turned")):
            expected[f"align/weight/{one}"] = sum(float(report.weights[i]) for report in seen) / 4
            expected[f"align/norm/{one}"] = sum(float(report.norms[i]) for report in seen) / 4
            for j, other in list(enumerate(("ce", "kd", "turned")))[i + 1 :]:
                expected[f"align/cosine/{one}/{other}"] = sum(float(report.cosines[i, j]) for report in seen) / 4
        assert logged == pytest.approx(expected, rel=1e-6)
    assert first["align/conflicts"] >= 1.0
    state = json.dumps(reports.trainer.state.log_history)  # as a checkpoint holds it
    assert "NaN" not in state


def test_the_log_leaves_out_what_was_not_seen(tmp_path):
    # Streamed, the products of two auxiliaries are not seen; rules of rows have no weights.
    streamed = watched(tmp_path, "ga-soft", max_steps=1).trainer.state.log_history[0]
    assert {"align/cosine/ce/kd", "align/cosine/ce/turned", "align/weight/ce"} < set(streamed)
    assert "align/cosine/kd/turned" not in streamed
    rowwise = watched(tmp_path, "graddrop", max_steps=1).trainer.state.log_history[0]
    assert "align/cosine/kd/turned" in rowwise
    assert not any(name.startswith("align/weight") for name in rowwise)


def test_the_log_counts_an_alignment_once_and_joins_blocks(tmp_path):
    options = {"trainer_options": {"aligner_options": {"update_every": 2, "granularity": "param_group"}}}
    reports = watched(tmp_path, "pcgrad", logging_steps=3, max_steps=3, **options)
    aligned = [reports.seen[0], reports.seen[2]]
    assert reports.seen[1] is aligned[0]
    products = [report.gramian.sum(0) for report in aligned]  # of the whole gradients
    cosine = sum(G[0, 1] / (G[0, 0] * G[1, 1]).sqrt() for G in products) / 2
    assert reports.trainer.state.log_history[0]["align/cosine/ce/kd"] == pytest.approx(float(cosine))


def test_the_log_of_groups_that_come_and_go(tmp_path):
    class Changing(Aligned):
        def compute_loss(self, model, inputs, return_outputs=False):
            losses, _ = losses_of(model, inputs)
            return {name: losses[name] for name in ("ce", "kd" if self.state.global_step == 0 else "turned")}

    options = {"rule": "sum"}
    (entry, _) = trained(Changing, tmp_path, trainer_options=options, max_steps=2, logging_steps=2).state.log_history
    assert {"align/cosine/ce/kd", "align/cosine/ce/turned"} < set(entry)
    assert entry["align/weight/ce"] == 1.0


def test_a_skipped_step_is_logged(tmp_path):
    class Broken(Aligned):
        def compute_loss(self, model, inputs, return_outputs=False):
            losses, _ = losses_of(model, inputs)
            return losses | {"kd": losses["kd"] * (math.nan if self.state.global_step == 1 else 1.0)}

    options = {"rule": "upgrad", "aligner_options": {"nonfinite": "skip"}}
    trainer = trained(Broken, tmp_path, trainer_options=options, max_steps=3)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["align/skipped"] for entry in entries] == [0.0, 1.0, 0.0]
    assert not {"align/weight/ce", "align/cosine/ce/kd", "align/norm/kd"} & set(entries[1])
    assert "align/cosine/ce/turned" in entries[1]
    assert "align/weight/ce" in entries[2]


@pytest.mark.parametrize(("rule", "weights"), [("sum", (1, 1, 1)), ("ga-soft", (0.7, 0.3, 0.3))])
def test_evaluation_and_prediction(tmp_path, rule, weights):
    trainer = Aligned(model=bert(), args=arguments(tmp_path), eval_dataset=rows(10), rule=rule)
    plain = Plain(model=bert(), args=arguments(tmp_path), eval_dataset=rows(10))
    predicted, expected = trainer.predict(rows(10)), plain.predict(rows(10))
    assert (predicted.predictions == expected.predictions).all()
    assert (predicted.label_ids == expected.label_ids).all()
    with torch.no_grad():
        losses, _ = losses_of(bert(), trainer.data_collator(rows(10)))
    loss = sum(weight * value for weight, value in zip(weights, losses.values(), strict=True))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss))
    assert trainer.aligner is None


def test_evaluation_within_training(tmp_path):
    trainer = Aligned(
        model=bert(),
        args=arguments(tmp_path, eval_strategy="epoch", gradient_accumulation_steps=3),
        train_dataset=rows(16),
        eval_dataset=rows(8),
        **PCGRAD,
    )
    trainer.train()
    undisturbed = trained(Aligned, tmp_path, trainer_options=PCGRAD, gradient_accumulation_steps=3)
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2
    assert same_bits(parameters(trainer), parameters(undisturbed))


class StopsWithinAStep(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_training_that_was_stopped_within_a_step_leaves_nothing(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = Aligned(model=bert(), args=args, train_dataset=rows(16), callbacks=[StopsWithinAStep()], **PCGRAD)
    trainer.train()
    assert trainer.state.global_step == 0
    trainer.remove_callback(StopsWithinAStep)
    trainer.train()
    fresh = trained(Aligned, tmp_path, trainer_options=PCGRAD, gradient_accumulation_steps=2)
    assert same_bits(parameters(trainer), parameters(fresh))


def test_a_model_made_anew_gets_a_rule_made_anew(tmp_path):
    def made():
        return bert()

    trainer = Aligned(model_init=made, args=arguments(tmp_path), train_dataset=rows(16), **PCGRAD)
    trainer.train()
    first, aligner = parameters(trainer), trainer.aligner
    trainer.train()
    assert trainer.aligner is not aligner
    assert same_bits(parameters(trainer), first)


def test_the_mixin_goes_before_another_trainer(tmp_path):
    class Sequences(AlignedTrainerMixin, Seq2SeqTrainer):
        compute_loss = Aligned.compute_loss

    args = Seq2SeqTrainingArguments(**{**arguments(tmp_path).to_dict(), "accelerator_config": None})
    trainer = Sequences(model=bert(), args=args, train_dataset=rows(16), **PCGRAD)
    trainer.train()
    assert same_bits(parameters(trainer), parameters(trained(Aligned, tmp_path, trainer_options=PCGRAD)))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return processes.run(train_on_ranks, 2, str(folder), folder=folder)


@pytest.mark.parametrize("case", RANKED)
def test_two_ranks_are_one_process(tmp_path, ranks, case):
    one = train_ranked(case, tmp_path, size=1)
    assert [outcome[case]["wrapped"] for outcome in ranks] == ["DistributedDataParallel"] * 2
    assert_close(ranks[0][case]["parameters"], one["parameters"])
    assert same_bits(ranks[0][case]["parameters"], ranks[1][case]["parameters"])
    for ours, theirs in zip(ranks[0][case]["history"], one["history"], strict=True):
        seen = {name for name in ours if name == "loss" or name.startswith("align/")}
        assert {name: ours[name] for name in seen} == pytest.approx({name: theirs[name] for name in seen}, rel=1e-6)


def test_sharded_models_are_refused(tmp_path):
    class OnCPU(Aligned):
        """What accelerate says of itself under FSDP, which it makes on a GPU alone."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.state.distributed_type = DistributedType.FSDP

    try:
        with pytest.raises(NotImplementedError, match=r"`args` must ask for one device or .*, got FSDP"):
            OnCPU(model=bert(), args=arguments(tmp_path), rule="sum")
    finally:
        AcceleratorState._reset_state(True)


def returning(made):
    class Returning(AlignedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            return made(*losses_of(model, inputs))

    return Returning


@pytest.mark.parametrize(
    ("made", "rule", "error", "message"),
    [
        (lambda losses, _: {"ce": losses["ce"]}, "ga-soft", ValueError, "`GASoft` must have at least 2 loss groups"),
        (lambda losses, _: sum(losses.values()), "sum", TypeError, "must return a mapping .* in training, got Tensor"),
        (lambda losses, _: list(losses.values()), "sum", TypeError, "must return a mapping .*, got list"),
        (lambda losses, outputs: (losses, outputs), "sum", TypeError, "must return a mapping .*, got tuple"),
        (lambda losses, _: {}, "sum", ValueError, "must return at least one loss group"),
        (lambda losses, _: {"ce": 1.0}, "sum", TypeError, "loss group 'ce' to a scalar tensor, got float"),
        (lambda _, outputs: {"ce": outputs.logits}, "sum", ValueError, r"`losses\['ce'\]` must be scalar, got shape"),
    ],
)
def test_losses_that_are_none(tmp_path, made, rule, error, message):
    model = bert()
    with pytest.raises(error, match=message):
        trained(returning(made), tmp_path, model=model, trainer_options={"rule": rule})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), bert().parameters(), strict=True))


def test_evaluation_wants_outputs_too(tmp_path):
    trainer = returning(lambda losses, _: losses)(model=bert(), args=arguments(tmp_path), rule="sum")
    with pytest.raises(TypeError, match=r"must return \(losses, outputs\) with return_outputs=True, got dict"):
        trainer.evaluate(rows(4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "pc-grad"}, ValueError, "`rule` must be one of .*; did you mean 'pcgrad'"),
        ({"rule": 0.3}, TypeError, "`rule` must be a Rule, a RowRule, or the name of one"),
        ({}, TypeError, "missing 1 required keyword-only argument: 'rule'"),
        ({"rule": "sum", "aligner_options": 3}, TypeError, "`aligner_options` must be a mapping .*, got int"),
        ({"rule": "sum", "optim": "lomo"}, ValueError, "`args.optim` must name an .*, got 'lomo', which does within"),
    ],
)
def test_wrong_arguments(tmp_path, options, error, message):
    args = arguments(tmp_path, optim=options.pop("optim", "adamw_torch"))
    with pytest.raises(error, match=message):
        Aligned(model=bert(), args=args, **options)


def test_a_wrapped_optimizer_is_refused(tmp_path):
    model = bert()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    with pytest.raises(
        TypeError, match=r"`optimizers` must hold a bare torch\.optim\.Optimizer, got a GradientAligner"
    ):
        Aligned(model=model, args=arguments(tmp_path), optimizers=(optimizer, None), rule="sum")


def test_an_optimizer_made_past_the_aligner_is_refused(tmp_path):
    class Past(Aligned):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    with pytest.raises(TypeError, match="`create_optimizer` must return what AlignedTrainer's returns, got Accel"):
        trained(Past, tmp_path, trainer_options=PCGRAD)


def test_without_transformers_the_extra_is_named():
    code = "import sys; sys.modules['transformers'] = None; import gradalign.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        'needs the package `transformers`, which is not installed; pip install "gradalign[transformers]"' in done.stderr
    )


@pytest.mark.filterwarnings("ignore:.pin_memory. argument is set:UserWarning")  # the page also runs on a GPU
def test_the_page_shows_a_program_that_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "shown"})
    assert "AlignmentReport(ce, kd: weights" in capsys.readouterr().out
