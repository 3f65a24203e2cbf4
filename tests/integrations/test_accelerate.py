"""Accelerate's loop with an aligner gives what a plain loop gives."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.testing import assert_close

from gradalign import GradientAligner, MissingExtraError
from gradalign.integrations.accelerate import backward
from gradalign.rules import GASoft, PCGrad
from tests.distributed import processes
from tests.integrations import accelerated, plain_loop, small


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    accelerated.forget()


def accelerator_of(**options):
    return Accelerator(cpu=True, **options)


@pytest.mark.parametrize("number", [1, 2])  # of micro-batches; of five batches the last stands alone
@pytest.mark.parametrize("rule", ["pcgrad", "ga-soft", "moco"])
def test_equals_a_plain_loop(rule, number):
    accelerator = accelerator_of(gradient_accumulation_steps=number)
    aligner, (model, optimizer, scheduler, loader) = accelerated.prepared(accelerator, rule)
    conflicts = []
    aligner.register_step_pre_hook(lambda *_: conflicts.append(aligner.report.conflicts))
    accelerated.epoch(accelerator, model, optimizer, scheduler, loader)

    plain, plain_aligner, plain_scheduler = plain_loop.make(rule)
    plain_loop.plain_epoch(plain, plain_aligner, plain_scheduler, number, small.batches())
    assert small.same_bits(small.parameters(model), small.parameters(plain))
    assert aligner.param_groups[0]["lr"] == plain_aligner.param_groups[0]["lr"] < 0.1
    assert len(conflicts) == (5 if number == 1 else 3)
    assert any(conflicts)


def test_bfloat16():
    accelerator = accelerator_of(mixed_precision="bf16")
    _, (model, optimizer, scheduler, loader) = accelerated.prepared(accelerator)
    accelerated.epoch(accelerator, model, optimizer, scheduler, loader)

    plain, aligner, plain_scheduler = plain_loop.make()
    plain_loop.plain_epoch(
        plain, aligner, plain_scheduler, 1, small.batches(), lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert small.same_bits(small.parameters(model), small.parameters(plain))


def with_a_scaler(scale):
    """An accelerator with the scaler of float16 training, which Accelerate itself makes for GPUs alone."""
    accelerator = accelerator_of()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


def test_the_scaler_of_float16_training():
    accelerator = with_a_scaler(2.0**12)
    aligner, (model, optimizer, scheduler, loader) = accelerated.prepared(accelerator)
    optimizer.scaler = accelerator.scaler
    accelerated.epoch(accelerator, model, optimizer, scheduler, loader)

    plain, plain_aligner, plain_scheduler = plain_loop.make()
    plain_loop.plain_epoch(
        plain,
        plain_aligner,
        plain_scheduler,
        1,
        small.batches(),
        context=lambda: torch.autocast("cpu", torch.float16),
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12),
    )
    assert small.same_bits(small.parameters(model), small.parameters(plain))
    assert torch.equal(aligner.report.gramian, plain_aligner.report.gramian)


def test_an_overflow_leaves_the_step_out_and_the_scheduler_waits():
    accelerator = with_a_scaler(2.0**12)
    aligner, (model, optimizer, scheduler, _) = accelerated.prepared(accelerator)
    before = small.parameters(model)
    losses = model(*small.batches()[0])
    backward(accelerator, optimizer, {**losses, "second": losses["second"] * torch.inf})
    optimizer.step()
    scheduler.step()
    assert optimizer.step_was_skipped
    assert small.same_bits(before, small.parameters(model))
    assert aligner.param_groups[0]["lr"] == 0.1
    assert accelerator.scaler.get_scale() == 2.0**11


def test_a_probe_in_micro_batches():
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    aligner, (model, optimizer, _, loader) = accelerated.prepared(accelerator, GASoft(0.3))
    gramians = []
    for x, labels in list(loader)[:2]:
        with accelerator.accumulate(model):
            first = {"first": model(x, labels)["first"]}
            backward(accelerator, optimizer, first, probe=lambda x=x, labels=labels: others(model, x, labels))
            if accelerator.sync_gradients:
                gramians.append(aligner.report.gramian)
    plain, plain_aligner, _ = plain_loop.make("ga-soft")
    x, labels = small.data().tensors
    plain_aligner.backward(plain(x[:8], labels[:8]))
    assert len(gramians) == 1
    assert_close(gramians[0][0], plain_aligner.report.gramian[0], rtol=1e-4, atol=1e-6)  # another order of float32 sums


def others(model, x, labels):
    return {name: loss for name, loss in model(x, labels).items() if name != "first"}


def test_a_resumed_run_has_the_same_bits(tmp_path):
    def fresh():
        accelerated.forget()
        accelerator = accelerator_of()
        return accelerator, *accelerated.prepared(accelerator)

    accelerator, aligner, prepared = fresh()
    accelerated.epoch(accelerator, *prepared)
    accelerator.save_state(str(tmp_path / "saved"))
    saved = aligner.rule.state_dict()["generator"].clone()
    accelerated.epoch(accelerator, *prepared)
    straight = small.parameters(prepared[0])

    accelerator, again, prepared = fresh()
    accelerator.load_state(str(tmp_path / "saved"))
    assert torch.equal(again.rule.state_dict()["generator"], saved)
    accelerated.epoch(accelerator, *prepared)
    assert small.same_bits(small.parameters(prepared[0]), straight)

    accelerator, forgetful, prepared = fresh()
    accelerator.load_state(str(tmp_path / "saved"))
    forgetful.rule.load_state_dict(PCGrad().state_dict())
    accelerated.epoch(accelerator, *prepared)
    assert not small.same_bits(small.parameters(prepared[0]), straight)  # so the rule's state it was


def test_two_processes_equal_one_on_the_whole_batch(tmp_path):
    numbers = [1, 2]  # of micro-batches
    ranks = processes.run(accelerated.on_a_rank, 2, numbers, folder=tmp_path)
    assert all("trainings" in rank for rank in ranks), ranks
    for number, first, second in zip(numbers, *(rank["trainings"] for rank in ranks), strict=True):
        assert first["wrapped"] == "DistributedDataParallel"
        assert first["processes"] == 2
        accelerator = accelerator_of(gradient_accumulation_steps=number)
        _, (model, optimizer, scheduler, loader) = accelerated.prepared(accelerator, size=4)
        # Accelerate steps a prepared scheduler once for each process, for it sees that many more rows a step.
        scheduler.scheduler.gamma = 0.9**2
        accelerated.epoch(accelerator, model, optimizer, scheduler, loader)
        assert small.same_bits(first["parameters"], second["parameters"])
        assert_close(first["parameters"], small.parameters(model))
        accelerated.forget()


def test_other_things_than_a_prepared_aligner_are_refused():
    accelerator = accelerator_of()
    model, aligner, _ = plain_loop.make()
    losses = model(*small.batches()[0])
    with pytest.raises(
        TypeError, match=r"`optimizer` must be a GradientAligner that the accelerator prepared, got an unprepared Grad"
    ):
        backward(accelerator, aligner, losses)
    bare = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        TypeError, match=r"got AcceleratedOptimizer around SGD; write accelerator\.prepare\(model, Grad"
    ):
        backward(accelerator, bare, losses)
    with pytest.raises(
        TypeError, match=r"got an unprepared GradientAligner; write"
    ):  # its step would not be the accelerator's
        backward(accelerator, GradientAligner(bare, "sum"), losses)
    with pytest.raises(TypeError, match=r"`accelerator` must be an accelerate\.Accelerator, got SGD"):
        backward(bare.optimizer, aligner, losses)


def test_what_the_aligner_refuses_it_names():
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    aligner, (_, optimizer, _, _) = accelerated.prepared(accelerator)
    for losses, said in (
        (torch.tensor(1.0), "`losses` must map each loss group's name to a scalar loss, got Tensor"),
        ({"first": None}, r"`losses\['first'\]` must be a scalar tensor or a sequence of them, got NoneType"),
        ({"first": [1.0]}, r"`losses\['first'\]` must be a scalar tensor, got float 1\.0"),
    ):
        with pytest.raises(TypeError, match=said):
            backward(accelerator, optimizer, losses)
    with pytest.raises(TypeError, match="`probe` must be a function without arguments that returns losses, got int"):
        backward(accelerator, optimizer, {"first": torch.tensor(1.0)}, probe=1)
    assert aligner.report is None


@pytest.mark.parametrize(
    ("kind", "version_2", "said"),
    [
        (
            "DEEPSPEED",
            False,
            r"`accelerator` must leave every parameter its own gradient, got one with DEEPSPEED; take",
        ),
        ("MEGATRON_LM", False, r"got one with MEGATRON_LM; take"),
        ("FSDP", False, r"got one with FSDP, version 1; take DistributedDataParallel, or FSDP of version 2"),
        ("FSDP", True, r"`accelerator` must reduce every micro-batch's gradients with FSDP, got one that leaves them"),
    ],
)
def test_an_engine_that_keeps_the_gradients_is_refused(kind, version_2, said, monkeypatch):
    """Accelerate does not make these on a CPU: here it only says that it has."""
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    aligner, (model, optimizer, _, _) = accelerated.prepared(accelerator)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    monkeypatch.setattr(Accelerator, "is_fsdp2", version_2)
    with accelerator.accumulate(), pytest.raises(ValueError, match=said):
        backward(accelerator, optimizer, model(*small.batches()[0]))
    assert aligner.report is None


def test_the_page(tmp_path, monkeypatch, capsys):
    small.run_page("accelerate", tmp_path, monkeypatch)
    assert capsys.readouterr().out.count("conflicts: (") == 4


def test_a_missing_package_is_named(monkeypatch):
    with pytest.raises(
        MissingExtraError, match=r"needs the package `accelerate`, which is not .*gradalign\[accelerate\]"
    ):
        small.import_without(["accelerate"], "gradalign.integrations.accelerate", monkeypatch)
