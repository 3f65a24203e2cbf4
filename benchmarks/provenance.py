"""What a benchmark writes beside its figures: how, on what machine and at which commit they were measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# What figures depend on: results and documents do not count.
_MEASURED = ("gradalign", "benchmarks", ":(exclude)benchmarks/results")
_CPU_INFORMATION = Path("/proc/cpuinfo")


def commit() -> str:
    """Return the commit that is measured, marked where the tree has changes, other than to earlier results."""
    root = _said_by_git("rev-parse", "--show-toplevel")
    changes = _said_by_git("-C", root, "status", "--porcelain", "--untracked-files=no", "--", *_MEASURED)
    return (_said_by_git("describe", "--always") or "unknown") + ("-dirty" if changes else "")


def _said_by_git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """Return the kind of machine, its CPUs and the threads in use."""
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"


def device_name(device: str) -> str:
    """Return the model of an accelerator, or of the CPU where the system tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if _CPU_INFORMATION.exists():
        for line in _CPU_INFORMATION.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each distribution."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def record(device: str, peers: Sequence[str] = ()) -> dict[str, object]:
    """Return how and on what is measured.

    Args:
        device: As torch names it.
        peers: Distributions that are measured beside gradalign.
    """
    return {
        # The script by its place in the checkout, wherever that lies.
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "device": device,
        "device name": device_name(device),
        "torch": torch.__version__,
        "commit": commit(),
        "peers": versions(peers),
    }


def write(path: Path, results: Mapping[str, object]) -> None:
    """Write the results as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
