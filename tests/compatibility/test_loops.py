"""What inner optimizers and loops the aligner works with: the second table in docs/compatibility.md."""

from __future__ import annotations

import pytest
import torch

from tests.compatibility.loops import LOOPS, RULES

needs_cuda = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_cuda if loop.device == "cuda" else ()) for name, loop in LOOPS.items()]
)
def test_cell(name, rule):
    loop = LOOPS[name]
    if loop.refused is None:
        loop.check(rule)
    else:
        error, match = loop.refused
        with pytest.raises(error, match=match):
            loop.check(rule)
