"""What the ranks of test_processes do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from gradalign import cli
from gradalign.multiexit import processes, training
from gradalign.multiexit.runs import Run
from gradalign.multiexit.text.workload import MODEL, TextWorkload
from gradalign.multiexit.training import Interrupted, train

CPU = torch.device("cpu")


def trained(rank, size, folder, stop=None):
    """Train the run of a folder; stop after so many steps, by Ctrl-C at the last rank alone, and go on."""
    run = Run(Path(folder))
    if stop is not None:
        stopped = _stop(run, rank, size, stop)
    workload = TextWorkload(run.config, CPU)
    written, save = [], TextWorkload.save
    TextWorkload.save = lambda self, model, where: written.append(str(where)) or save(self, model, where)
    train(run, workload)
    return {
        "weights": dict(workload.load(run.folder).state_dict()) if rank == 0 else {},
        "saves": len(written),
        "stopped": stop is not None and stopped,
        "model": (run.folder / MODEL).is_dir(),
    }


def _stop(run, rank, size, at):
    step = training._Training._step

    def interrupting(self):
        if self.step == at - 1 and rank == size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    training._Training._step = interrupting
    try:
        train(run, TextWorkload(run.config, CPU))
    except Interrupted as error:
        return error.step
    finally:
        training._Training._step = step
    return None


def all_at_once(rank, size, folder):
    """All that takes several ranks: starting them takes longer than what they do."""
    return {
        "agreed": agreed(),
        "refused": cli.main([*command(Run(Path(folder)).config), "--out", folder]),
        "trained": trained(rank, size, folder, stop=4),
    }


def command(config):
    """A command that trains something like it."""
    return ["train", "--task", config.task, "--backbone", config.backbone, "--data-dir", config.data_dir]


def agreed():
    """What the functions that ask all ranks return."""
    return {
        "rank": processes.rank(),
        "ranks": processes.ranks(),
        "any": [processes.any_rank(processes.rank() == 1, CPU), processes.any_rank(False, CPU)],
        "mean": float(processes.mean(torch.tensor(float(processes.rank() + 1)))),
        "joined": _joined(),
    }


def _joined():
    with processes.joined(CPU) as device:  # it is in a group already, and stays in it
        return str(device)
