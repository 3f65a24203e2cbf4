"""The loop that a trainer writes for its users, with nothing of a trainer in it."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from gradalign import GradientAligner
from tests.integrations import small

CLIP = 0.5  # below most gradients' norms here


def make(rule="pcgrad"):
    model = small.Net()
    aligner = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rule)
    return model, aligner, torch.optim.lr_scheduler.StepLR(aligner, step_size=1, gamma=0.9)


def plain_epoch(model, aligner, scheduler, number, batches, context=nullcontext, scaler=None):
    """Train for an epoch; of ``number`` micro-batches a step, but the last may have fewer."""
    for i, (x, labels) in enumerate(batches):
        last = (i + 1) % number == 0 or i + 1 == len(batches)
        with context():
            losses = model(x, labels)
        with nullcontext() if last else aligner.accumulate():
            aligner.backward({name: loss / number for name, loss in losses.items()}, scaler=scaler)
        if last:
            _step(model, aligner, scaler)
            scheduler.step()
            aligner.zero_grad()


def _step(model, aligner, scaler):
    if scaler is None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        aligner.step()
        return
    scaler.unscale_(aligner)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    scaler.step(aligner)
    scaler.update()
