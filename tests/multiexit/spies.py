"""Runs that Ctrl-C stops at chosen steps, what their optimizers were told, and whether two came to the same bits."""

from __future__ import annotations

import os
import signal

import torch

from gradalign.multiexit import training


def interrupting(monkeypatch, steps):
    """Send Ctrl-C before each of these steps, counted over all stages from 0."""
    left = list(steps)
    step = training._Training._step

    def stepping(self):
        if left and self.steps_before + self.step == left[0]:
            left.pop(0)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(training._Training, "_step", stepping)


def same_files(one, two, network="model.safetensors"):
    """Return whether two runs have the same network, metrics and logits."""
    names = (network, "metrics.jsonl", "logits.safetensors")
    return all((one.folder / name).read_bytes() == (two.folder / name).read_bytes() for name in names)


def rates_of_sgd(monkeypatch):
    """Return a list that grows by the learning rate of each step that an SGD takes."""
    rates = []
    step = torch.optim.SGD.step

    def seen(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", seen)
    return rates
