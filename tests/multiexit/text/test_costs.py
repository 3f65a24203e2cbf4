from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.multiexit.text.tiny import CONFIGS, KINDS, network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("length", [5, 8])
def test_macs_are_half_the_counted_flops(family, kind, length):
    model = network(family, exit=kind, num_labels=3)
    counted, total = [], 0
    # Attention by plain matrix products: the counter does not know the CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        hidden = None
        for exit in range(1, 4):
            with FlopCounterMode(display=False) as counter:
                hidden = model.start({"input_ids": torch.arange(5, 5 + length)[None]}) if hidden is None else hidden
                hidden, _ = model.advance(hidden, exit)
            total += counter.get_total_flops() / 2
            # torch multiplies a mixture of one layer without a matrix product, which is not counted.
            counted.append(total + (16 if kind == "mix" else 0))
    assert list(model.exit_macs(length)) == counted


@pytest.mark.parametrize("kind", KINDS)
def test_without_heads_only_the_last_one_counts(kind):
    several, one = network(exit=kind), network(exit=kind, exits=[])
    assert several.exit_macs(7, heads=False)[-1] == one.exit_macs(7)[-1] < several.exit_macs(7)[-1]
