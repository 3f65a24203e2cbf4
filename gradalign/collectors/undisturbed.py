"""Calling a user's code more often than it expects, and leaving no trace: random states, buffers, caches."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class RandomState:
    """The state of the global random generators, to be returned to: torch's, Python's, and NumPy's where it is loaded.

    Args:
        devices: Whose generators a dropout may draw from.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy = sys.modules.get("numpy")
        self._of_numpy = None if self._numpy is None else self._numpy.random.get_state()
        self._others = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._cpu)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.random.set_state(self._of_numpy)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def spared_buffers(*, scripts: Callable[[], None] | None = None) -> Iterator[None]:
    """Give every module that is called within copies of its buffers, and take them away afterwards.

    Statistics of batch normalisation, and whatever else a module writes into its buffers, are written into the
    copies; the buffers themselves are not touched. A method that is called past the module's ``__call__`` is not seen.

    Args:
        scripts: Called for a TorchScript module, whose buffers are copied and written back.
    """
    buffers = _Buffers(scripts)
    handle = register_module_forward_pre_hook(buffers.spare)
    try:
        yield
    finally:
        handle.remove()
        buffers.put_back()


class _Buffers:
    def __init__(self, scripts: Callable[[], None] | None) -> None:
        self._scripts = scripts
        self._seen: set[int] = set()
        self._copies: dict[int, Tensor] = {}
        self._replaced: list[tuple[dict[str, Any], str, Tensor]] = []
        self._scripted: list[tuple[Tensor, Tensor]] = []

    def spare(self, module: nn.Module, inputs: object) -> None:
        """Replace the buffers of a module that is about to be called, and of those within it."""
        if id(module) in self._seen:
            return
        for part in module.modules():
            if id(part) in self._seen:
                continue
            self._seen.add(id(part))
            if isinstance(part, torch.jit.ScriptModule):
                self._scripted.extend((buffer, buffer.detach().clone()) for buffer in part.buffers())
                if self._scripts is not None:
                    self._scripts()
            else:
                self._replace(part._buffers)

    def _replace(self, buffers: dict[str, Any]) -> None:
        for name, buffer in buffers.items():
            if buffer is not None:
                self._replaced.append((buffers, name, buffer))
                if id(buffer) not in self._copies:
                    with torch.inference_mode(False):  # a copy that only inference can use would not do later
                        self._copies[id(buffer)] = buffer.detach().clone()
                buffers[name] = self._copies[id(buffer)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the modules have their buffers again."""
        for buffers, name, buffer in self._replaced:
            buffers[name] = buffer
        for buffer, copy in self._scripted:
            buffer.copy_(copy)
