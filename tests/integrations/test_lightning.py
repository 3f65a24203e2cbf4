"""Lightning's Trainer with an aligner gives what a plain loop gives."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset

from gradalign import MissingExtraError
from gradalign.integrations.lightning import AlignmentMonitor
from gradalign.integrations.scalars import scalars
from gradalign.rules import PCGrad
from tests.distributed import processes
from tests.integrations import lightning_training, small
from tests.integrations.lightning_training import Module, loader, trainer_of
from tests.integrations.plain_loop import CLIP, make, plain_epoch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own use of torch
]


def assert_as_plain(module, rule, number, **options):
    plain, aligner, scheduler = make(rule)
    plain_epoch(plain, aligner, scheduler, number, small.batches(), **options)
    assert small.same_bits(small.parameters(module.net), small.parameters(plain))
    assert module.aligner.param_groups[0]["lr"] == aligner.param_groups[0]["lr"] < 0.1
    return aligner


@pytest.mark.parametrize("number", [1, 2])  # of micro-batches; of five batches the last stands alone
@pytest.mark.parametrize("rule", ["pcgrad", "ga-soft", "moco"])
def test_equals_a_plain_loop(rule, number, tmp_path):
    module = Module(rule)
    trainer_of(tmp_path, accumulate_grad_batches=number, gradient_clip_val=CLIP).fit(module, loader())
    assert_as_plain(module, rule, number)
    assert len(module.seen) == (5 if number == 1 else 3)
    assert any(report.conflicts for report in module.seen)


class Streamed(IterableDataset):
    """Batches without a length."""

    def __iter__(self):
        return iter(small.batches())


@pytest.mark.parametrize("limit", [3, None])
@pytest.mark.parametrize("data", [loader(), DataLoader(Streamed(), batch_size=None)], ids=["sized", "streamed"])
def test_the_last_batch_of_an_epoch_ends_a_step(data, limit, tmp_path):
    module = Module()
    trainer = trainer_of(
        tmp_path, accumulate_grad_batches=2, gradient_clip_val=CLIP, limit_train_batches=limit, max_epochs=2
    )
    trainer.fit(module, data)
    plain, aligner, scheduler = make("pcgrad")
    for _ in range(2):
        plain_epoch(plain, aligner, scheduler, 2, small.batches()[:limit])
    assert small.same_bits(small.parameters(module.net), small.parameters(plain))


def test_bfloat16(tmp_path):
    module = Module()
    trainer_of(tmp_path, precision="bf16-mixed", gradient_clip_val=CLIP).fit(module, loader())
    assert_as_plain(module, "pcgrad", 1, context=lambda: torch.autocast("cpu", torch.bfloat16))


def test_the_scaler_of_float16_training(tmp_path):
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    module = Module()
    trainer_of(tmp_path, plugins=[precision], gradient_clip_val=CLIP, accumulate_grad_batches=2).fit(module, loader())
    aligner = assert_as_plain(
        module,
        "pcgrad",
        2,
        context=lambda: torch.autocast("cpu", torch.float16),
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12),
    )
    assert torch.equal(module.aligner.report.gramian, aligner.report.gramian)


class Overflowing(Module):
    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx)
        return {**losses, "second": losses["second"] * torch.inf} if batch_idx == 1 else losses


def test_an_overflow_leaves_the_step_out(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    module = Overflowing()
    trainer_of(tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], limit_train_batches=2).fit(
        module, loader()
    )
    once = Module()
    again = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    trainer_of(tmp_path, plugins=[again], limit_train_batches=1).fit(once, loader())
    assert scaler.get_scale() == 2.0**11
    assert small.same_bits(small.parameters(module), small.parameters(once))


def test_nonfinite_skip_leaves_the_step_out(tmp_path):
    module, once = Overflowing(nonfinite="skip"), Module()
    trainer_of(tmp_path, limit_train_batches=2).fit(module, loader())
    trainer_of(tmp_path, limit_train_batches=1).fit(once, loader())
    assert module.aligner.skipped_steps == 1
    assert small.same_bits(small.parameters(module), small.parameters(once))


def test_a_resumed_run_has_the_same_bits(tmp_path):
    straight = Module()
    trainer_of(tmp_path, max_epochs=3, gradient_clip_val=CLIP).fit(straight, loader())

    first = Module()
    trainer = trainer_of(tmp_path, max_epochs=1, gradient_clip_val=CLIP)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = first.aligner.rule.state_dict()["generator"]

    again = Module()
    trainer_of(tmp_path, max_epochs=3, gradient_clip_val=CLIP).fit(again, loader(), ckpt_path=tmp_path / "saved.ckpt")
    assert small.same_bits(small.parameters(again), small.parameters(straight))
    assert not torch.equal(saved, PCGrad().state_dict()["generator"])

    forgetful = Module()
    forgetful.on_train_start = lambda: forgetful.aligner.rule.load_state_dict(PCGrad().state_dict())
    trainer_of(tmp_path, max_epochs=3, gradient_clip_val=CLIP).fit(
        forgetful, loader(), ckpt_path=tmp_path / "saved.ckpt"
    )
    assert not small.same_bits(small.parameters(forgetful), small.parameters(straight))  # so the rule's state it was


def test_two_processes_equal_one_on_the_whole_batch(tmp_path):
    numbers = [1, 2]  # of micro-batches
    ranks = processes.run(lightning_training.on_a_rank, 2, tmp_path, numbers, folder=tmp_path)
    assert all("trainings" in rank for rank in ranks), ranks
    for number, first, second in zip(numbers, *(rank["trainings"] for rank in ranks), strict=True):
        assert first["wrapped"] == "DistributedDataParallel"
        assert first["processes"] == 2
        one = Module()
        trainer_of(tmp_path, accumulate_grad_batches=number, gradient_clip_val=CLIP).fit(one, loader(size=4))
        assert small.same_bits(first["parameters"], second["parameters"])
        assert_close(first["parameters"], small.parameters(one.net))


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 2, 4]), (2, [1, 3]), (0, [])])
def test_the_monitor_logs_each_alignment_once(every, steps, tmp_path):
    module = Module(update_every=2)  # aligned at steps 0, 2 and 4
    logger = CSVLogger(tmp_path)
    trainer = trainer_of(tmp_path, logger=logger, callbacks=[AlignmentMonitor()], log_every_n_steps=every)
    trainer.fit(module, loader())
    file = Path(logger.log_dir) / "metrics.csv"
    logged = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.exists() else []
    assert [int(row["step"]) for row in logged] == steps
    for row in logged:
        found = {name.removeprefix("align/"): float(value) for name, value in row.items() if name.startswith("align/")}
        assert found == scalars(module.seen[int(row["step"])])
    assert any(report.conflicts for report in module.seen)
    if steps:
        assert trainer.callback_metrics["align/conflicts"] == float(logged[-1]["align/conflicts"])


def test_the_trainer_sees_the_sum_as_its_loss(tmp_path):
    outputs = []
    module = Module()
    module.on_train_batch_end = lambda output, batch, batch_idx: outputs.append(output)
    trainer_of(tmp_path, limit_train_batches=1).fit(module, loader())
    with torch.no_grad():
        losses = small.Net()(*small.batches()[0])
    assert_close(outputs[0]["loss"], sum(losses.values()))
    assert not outputs[0]["loss"].requires_grad


def test_a_training_step_may_skip_the_batch(tmp_path):
    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skipping()
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        trainer_of(tmp_path, limit_train_batches=2).fit(module, loader())
    assert module._losses is None


def test_manual_optimization_is_left_alone(tmp_path):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = sum(self.net(*batch).values())
            self.manual_backward(loss)
            return {"anything": self.net.trunk.weight.grad}

    module = Manual()
    trainer_of(tmp_path, limit_train_batches=1).fit(module, loader())
    plain = small.Net()
    sum(plain(*small.batches()[0]).values()).backward()
    assert torch.equal(module.net.trunk.weight.grad, plain.trunk.weight.grad)


def test_an_aligner_under_manual_optimization(tmp_path):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.optimizer.backward(self.net(*batch))
            torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP)
            optimizer.step()
            self.lr_schedulers().step()

    module = Manual()
    trainer = trainer_of(tmp_path)
    trainer.fit(module, loader())
    assert_as_plain(module, "pcgrad", 1)
    assert trainer.global_step == 5


def test_one_loss_is_not_named_losses(tmp_path):
    class Single(Module):
        def training_step(self, batch, batch_idx):
            return sum(self.net(*batch).values())

    with pytest.raises(TypeError, match=r"`training_step` must return named losses or None, got Tensor; write return"):
        trainer_of(tmp_path).fit(Single(), loader())


def test_a_bare_optimizer_is_refused(tmp_path):
    class Bare(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match=r"`configure_optimizers` must return a GradientAligner, got SGD; write Grad"):
        trainer_of(tmp_path).fit(Bare(), loader())


def test_what_the_aligner_refuses_it_names(tmp_path):
    class Wrong(Module):
        def training_step(self, batch, batch_idx):
            return {"first": 1.0}

    with pytest.raises(
        TypeError, match=r"`losses\['first'\]` must be a scalar tensor or a sequence of them, got float"
    ):
        trainer_of(tmp_path).fit(Wrong(), loader())


def test_the_page(tmp_path, monkeypatch, capsys):
    small.run_page("lightning", tmp_path, monkeypatch)
    assert "conflicts: " in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch):
    with pytest.raises(
        MissingExtraError, match=r"needs the package `lightning`, which is not .*gradalign\[lightning\]"
    ):
        small.import_without(["lightning"], "gradalign.integrations.lightning", monkeypatch)
