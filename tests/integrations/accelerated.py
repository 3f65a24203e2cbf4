"""A training by Accelerate."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from gradalign.integrations.accelerate import backward
from tests.integrations import small
from tests.integrations.plain_loop import CLIP, make


def prepared(accelerator, rule="pcgrad", size=4):
    model, aligner, scheduler = make(rule)
    loader = DataLoader(small.data(), batch_size=size)
    return aligner, accelerator.prepare(model, aligner, scheduler, loader)


def epoch(accelerator, model, optimizer, scheduler, loader):
    """Train for an epoch, as Accelerate's documentation writes a loop."""
    for x, labels in loader:
        with accelerator.accumulate(model):
            backward(accelerator, optimizer, model(x, labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def forget():
    """Let the next Accelerator have settings of its own: they are the process's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def on_a_rank(rank, size, numbers):
    """Train on this rank's batches, with each number of micro-batches; return the parameters."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    outcome = []
    for number in numbers:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=number)
        _, (model, optimizer, scheduler, loader) = prepared(accelerator, size=2)
        epoch(accelerator, model, optimizer, scheduler, loader)
        trained = small.parameters(accelerator.unwrap_model(model))
        outcome.append({"parameters": trained, "wrapped": type(model).__name__, "processes": accelerator.num_processes})
        forget()
    return {"trainings": outcome}
