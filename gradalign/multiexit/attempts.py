"""Runs of which some may diverge while the others go on."""

from __future__ import annotations

import sys

import torch

from gradalign import NonFiniteError
from gradalign.errors import missing_extra
from gradalign.multiexit.runs import Run
from gradalign.multiexit.training import train
from gradalign.multiexit.workloads import workload_of

try:
    from tqdm import tqdm
except ImportError as error:
    raise missing_extra("tqdm", "multiexit") from error


def attempt(run: Run, device: torch.device | str) -> bool:
    """Train a run that is not finished, and return whether it is; one that diverges is told of on standard error.

    Raises:
        Interrupted: Ctrl-C; the same call goes on.
    """
    if run.finished:
        return True
    try:
        train(run, workload_of(run.config, device))
    except NonFiniteError as error:
        tqdm.write(f"{run.folder}: {error}", file=sys.stderr)
    return run.finished
