"""What doctests may use without importing it: torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

collect_ignore = [] if find_spec("triton") else ["gradalign/kernels"]  # doctests import what they are in


@pytest.fixture(autouse=True)
def _torch_in_doctests(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch
