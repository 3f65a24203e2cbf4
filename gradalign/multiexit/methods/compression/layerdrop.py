"""Layers that are skipped at random in training, so that half of them can be cut off in the end.

References: Fan et al., Reducing Transformer Depth on Demand with Structured Dropout, ICLR 2020, arXiv:1909.11556.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from gradalign.multiexit.methods.base import Judged, Method, Settings, Stage
from gradalign.multiexit.methods.compression.layers import layers_of, on_labels, replace_layers, whole, with_layers
from gradalign.rules import Sum

_RATE = 0.2


class Skipped(nn.Module):
    """A layer that is skipped in training with probability 0.2, by one coin for the batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the layer does, or the state as it came, (n, L, H)."""
        # The generator of the CPU, which each step seeds: no wait for an accelerator.
        if self.training and torch.rand(()).item() < _RATE:
            return hidden
        after: Tensor | tuple[Tensor, ...] = self.layer(hidden, mask)
        return after


def skipping(model: nn.Module, settings: Settings) -> nn.Module:
    """Return an encoder of the same layers, which are skipped in training, with the last exit."""
    made = whole(model, settings)
    replace_layers(made, lambda layer, number: Skipped(layer))
    return made


def pruned(model: nn.Module, work: Judged) -> nn.Module:
    """Return the encoder of layers 0, 2, 4, ...."""
    return with_layers(model, range(0, len(layers_of(model)), 2), lambda layer: cast(Skipped, layer).layer)


METHODS = (
    Method(
        "layerdrop",
        "layers skipped with probability 0.2 while all train; every other one is cut off in the end",
        (Stage(on_labels, lambda settings: Sum(), prepare=skipping),),
        finish=pruned,
        kinds=("text",),
    ),
)
