"""Run a function of the tests on several ranks, each a process of its own."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
from torch import distributed as dist
from torch import multiprocessing

TIMEOUT = timedelta(seconds=60)


def _rank(rank, size, folder, function, arguments, timeout):
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # pytest's own filters do not reach here
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout)
    try:
        outcome = function(rank, size, *arguments)
    except Exception as error:  # noqa: BLE001, whatever it is, the parent tells the test
        outcome = {"raised": type(error).__name__, "message": str(error)}
    torch.save(outcome, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run(function, size, *arguments, folder, timeout=TIMEOUT):
    """Return what ``function(rank, size, *arguments)`` returned on each rank, or what it raised; None if it died.

    Args:
        function: Of a module, for it is pickled by name. It returns tensors, plain values, lists and dictionaries.
        size: How many ranks.
        arguments: Of the function.
        folder: A fresh one, for the store and what is returned.
        timeout: Of the process group.
    """
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, size, folder, function, arguments, timeout)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.is_alive():  # it hangs: the test sees None
            process.kill()
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=True) if file.exists() else None for file in files]
