"""What a benchmark writes beside its figures: on what machine and at which commit they were measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch


def commit() -> str:
    """Return the commit that is measured, marked where the tree has changes."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """Return the kind of machine, its CPUs and the threads in use."""
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"


def write(path: Path, results: Mapping[str, object]) -> None:
    """Write the results as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
