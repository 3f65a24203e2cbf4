"""What doctests may use without importing it: torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

# Doctests import the modules that they are in, and some need a package of an extra.
_NEEDING = {"triton": "gradalign/kernels"} | {
    package: f"gradalign/integrations/{package}.py"
    for package in ("accelerate", "lightning", "tensorboard", "transformers")
}
collect_ignore = [module for package, module in _NEEDING.items() if not find_spec(package)]


@pytest.fixture(autouse=True)
def _torch_in_doctests(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch
