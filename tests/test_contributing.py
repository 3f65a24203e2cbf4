"""The rule that CONTRIBUTING.md shows is a rule."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from hypothesis import given
from torch.testing import assert_close

from tests.strategies import gradients, gramian_of

HEADER = """
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import Tensor
from gradalign.rules import Rule
"""


def shown_rule():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {"__name__": __name__}  # a dataclass looks its module up
    exec(HEADER + code, scope)
    return scope["ShortestOfTwo"]()


@given(J=gradients(min_groups=2, max_groups=2))
def test_the_example_gives_the_shortest_combination(J):
    G = gramian_of(J)
    w = shown_rule()(G)
    assert_close(w.sum(), torch.tensor(1.0, dtype=torch.float64))
    shortest = min(float((a * J[0] + (1 - a) * J[1]).norm()) for a in torch.linspace(0, 1, 101, dtype=torch.float64))
    length = math.sqrt(max(float(w @ G @ w), 0.0))
    assert length <= shortest + 1e-7 * float(J.norm())  # rounding of G under a square root
