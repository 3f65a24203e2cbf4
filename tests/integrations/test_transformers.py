"""AlignedTrainer trains as the Trainer does, with named losses: a real BERT, the real Trainer."""

from __future__ import annotations

import os

import pytest
import torch
from torch._dynamo import OptimizedModule
from torch.nn import functional as F
from torch.testing import assert_close

pytest.importorskip("transformers")

from accelerate.state import AcceleratorState

from gradalign import rules
from gradalign.integrations.transformers import AlignedTrainer
from tests.integrations.small_bert import Aligned, Plain, bert, losses_of, parameters, rows, trained


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Precision and compilation are left in what all accelerators of a process share, and in its environment."""
    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(True)
    os.environ.clear()
    os.environ.update(before)


def moved(trainer, dtype=torch.float32):
    """How far training moved all parameters, as one vector."""
    return torch.cat(
        [(a - b).flatten() for a, b in zip(parameters(trainer), bert(dtype=dtype).parameters(), strict=True)]
    ).detach()


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        # 18 rows make 9 micro-batches: the last step of an epoch has one.
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"max_grad_norm": 0.05, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"max_grad_norm": 0.0, "optim": "sgd", "weight_decay": 0.1},
    ],
    ids=["plain", "micro-batches", "clipped", "unclipped"],
)
def test_the_sum_is_the_trainer_on_the_sum(tmp_path, options):
    plain = trained(Plain, tmp_path / "plain", number=18, **options)
    aligned = trained(Aligned, tmp_path / "aligned", number=18, trainer_options={"rule": "sum"}, **options)
    assert_close(parameters(aligned), parameters(plain))
    assert len(plain.state.log_history) > 5
    for ours, theirs in zip(aligned.state.log_history, plain.state.log_history, strict=True):
        for name in {"loss", "grad_norm", "learning_rate", "epoch", "step"} & set(theirs):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name


def test_micro_batches_are_one_large_batch(tmp_path):
    whole = trained(Aligned, tmp_path / "1", trainer_options={"rule": "pcgrad"}, per_device_train_batch_size=8)
    parts = trained(
        Aligned,
        tmp_path / "2",
        trainer_options={"rule": "pcgrad"},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert_close(parameters(parts), parameters(whole))
    assert parts.aligner.report.conflicts
    assert_close(parts.aligner.report.gramian, whole.aligner.report.gramian)


class Summed(AlignedTrainer):
    """Sums over the items of the micro-batch by the number of all items, as the Trainer gives it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, outputs = losses_of(model, inputs)
        if num_items_in_batch is not None:
            losses = {name: loss * len(inputs["labels"]) / num_items_in_batch for name, loss in losses.items()}
        return (losses, outputs) if return_outputs else losses


def test_sums_over_the_number_of_items_are_not_divided_again(tmp_path):
    options = {"trainer_options": {"rule": "mgda"}, "optim": "sgd", "max_grad_norm": 0.0}
    whole = trained(Aligned, tmp_path / "1", per_device_train_batch_size=8, **options)
    parts = trained(Summed, tmp_path / "2", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert parts.model_accepts_loss_kwargs  # else the Trainer does not count items, and this tests nothing
    assert_close(parameters(parts), parameters(whole))


def test_compute_loss_func_needs_no_subclass(tmp_path):
    def named(outputs, labels, num_items_in_batch=None):
        ce = F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        return {"ce": ce, "turned": F.cross_entropy(outputs.logits, (labels + 1) % 3, reduction="sum") / 16}

    options = {"remove_unused_columns": True, "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 1}
    func = {"compute_loss_func": named, "rule": rules.Constant([2.0, 0.5])}
    trainer = trained(AlignedTrainer, tmp_path, trainer_options=func, **options)
    (entry,) = [one for one in trainer.state.log_history if "loss" in one]
    data, model = rows(16), bert()
    logits = model(input_ids=torch.stack([row["input_ids"] for row in data])).logits
    labels = torch.tensor([row["labels"] for row in data])
    loss = 2.0 * F.cross_entropy(logits, labels) + 0.5 * F.cross_entropy(logits, (labels + 1) % 3)
    assert entry["loss"] == pytest.approx(loss.item())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert_close(parameters(trainer), [p.detach() for p in model.parameters()])


def test_an_optimizer_and_a_schedule_of_ones_own(tmp_path):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    own = {"rule": rules.PCGrad(seed=3), "optimizers": (optimizer, schedule), "aligner_options": {"scope": "shared"}}
    trainer = trained(Aligned, tmp_path, model=model, trainer_options=own, num_train_epochs=1)
    assert trainer.aligner.inner is optimizer
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)
    assert "scope='shared'" in repr(trainer.aligner)


def test_activation_checkpointing(tmp_path):
    options = {"trainer_options": {"rule": "pcgrad"}, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    ways = [trained(Aligned, tmp_path, activation_checkpointing=on, **options) for on in (True, False)]
    assert [one.model.is_activation_checkpointing for one in ways] == [True, False]
    assert_close(*map(parameters, ways))


def test_a_compiled_model(tmp_path):
    options = {"trainer_options": {"rule": "pcgrad"}, "max_steps": 2}
    compiled = trained(Aligned, tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **options)
    assert isinstance(compiled.model_wrapped, OptimizedModule)
    assert_close(parameters(compiled), parameters(trained(Aligned, tmp_path, **options)))


def test_bf16(tmp_path):
    ways = {}
    for kind, bf16, given in ((Plain, False, {}), (Plain, True, {}), (Aligned, True, {"rule": "sum"})):
        options = {"trainer_options": given, "model": bert(dtype=torch.float32), "optim": "sgd", "learning_rate": 0.1}
        ways[kind, bf16] = moved(trained(kind, tmp_path, bf16=bf16, **options))
    assert distance(ways[Plain, True], ways[Plain, False]) > 1e-3  # it is bfloat16: one step is 2^-8 = 4e-3
    assert distance(ways[Aligned, True], ways[Plain, False]) < 2e-2


class HalfOnCPU(Aligned):
    """fp16 as the Trainer makes it on a GPU, which accelerate refuses to make on a CPU: autocast and a GradScaler."""

    scale = 2.0**10

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)


class Overflowing(HalfOnCPU):
    scale = 2.0**60


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_fp16(tmp_path, max_grad_norm):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": max_grad_norm, "gradient_accumulation_steps": 2}
    plain = trained(Plain, tmp_path, model=bert(dtype=torch.float32), **options)
    given = {"rule": "sum"}
    half = trained(HalfOnCPU, tmp_path, model=bert(dtype=torch.float32), trainer_options=given, **options)
    assert 1e-5 < distance(moved(half), moved(plain)) < 5e-3  # one step of float16 is 2^-11 = 5e-4
    assert half.aligner.report.norms.max() < 10  # the rule sees gradients without the scale


def test_an_overflow_of_fp16_leaves_the_step_out(tmp_path):
    given = {"rule": "pcgrad"}
    trainer = trained(Overflowing, tmp_path, model=bert(dtype=torch.float32), trainer_options=given, max_steps=2)
    assert not moved(trainer).any()
    assert trainer.accelerator.scaler.get_scale() == 2.0**58
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("align/")}
    assert logged == {"align/skipped"}  # nothing else is known of such a step
