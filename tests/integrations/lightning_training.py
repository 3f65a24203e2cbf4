"""One training by Lightning and by a plain loop."""

from __future__ import annotations

import os
import warnings

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler

from gradalign import GradientAligner
from gradalign.integrations.lightning import AlignedModule
from tests.integrations import small
from tests.integrations.plain_loop import CLIP


class Module(AlignedModule):
    def __init__(self, rule="pcgrad", **options):
        super().__init__()
        self.net = small.Net()
        self.rule, self.options = rule, options
        self.seen = []

    def training_step(self, batch, batch_idx):
        return self.net(*batch)

    def configure_optimizers(self):
        inner = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.aligner = GradientAligner(inner, self.rule, **self.options)
        scheduler = torch.optim.lr_scheduler.StepLR(self.aligner, step_size=1, gamma=0.9)
        return {"optimizer": self.aligner, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(optimizer.report)


def loader(size=4):
    return DataLoader(small.data(), batch_size=size)


def trainer_of(folder, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder}
    return Trainer(**(quiet | options))


def on_a_rank(rank, size, folder, numbers):
    """Train on this rank's rows, with each number of micro-batches; return the parameters."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    warnings.simplefilter("ignore")
    options = {"strategy": "ddp", "devices": size, "use_distributed_sampler": False}  # its own would shuffle
    sampler = DistributedSampler(small.data(), size, rank, shuffle=False)
    outcome = []
    for number in numbers:
        module = Module()
        trainer = trainer_of(folder, accumulate_grad_batches=number, gradient_clip_val=CLIP, **options)
        wrapped = []
        module.on_train_start = lambda trainer=trainer, to=wrapped: to.append(type(trainer.strategy.model).__name__)
        trainer.fit(module, DataLoader(small.data(), batch_size=2, sampler=sampler))
        outcome.append(
            {"parameters": small.parameters(module.net), "wrapped": wrapped[0], "processes": trainer.world_size}
        )
    return {"trainings": outcome}
