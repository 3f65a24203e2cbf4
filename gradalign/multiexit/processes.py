"""The processes that torchrun starts: which of them this is, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from gradalign.errors import GradAlignError


def rank() -> int:
    """Return the number of this process, 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def any_rank(said: bool, device: torch.device) -> bool:
    """Return whether any process says so; all of them must ask."""
    if ranks() == 1:
        return said
    flag = torch.tensor(int(said), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def mean(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a number over the processes; all of them must ask."""
    if ranks() == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / ranks()


def wait() -> None:
    """Wait until all processes are here."""
    if ranks() > 1:
        distributed.barrier()


def on_first(do: Callable[[], object], device: torch.device) -> None:
    """Do something in the first process while the others wait; all of them must ask.

    Raises:
        GradAlignError: In the others, where it failed.
    """
    failure: Exception | None = None
    if rank() == 0:
        try:
            do()
        except Exception as error:  # noqa: BLE001 (raised again once the others know)
            failure = error
    if any_rank(failure is not None, device):
        raise failure or GradAlignError("the first process failed; it says why.")


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and yield this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()
