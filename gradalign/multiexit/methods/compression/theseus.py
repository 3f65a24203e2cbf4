"""Layers that take the place of two each, step by step, while the rest of the network stays as it is.

References: Xu et al., BERT-of-Theseus, EMNLP 2020, arXiv:2002.02925.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradalign.multiexit.inference import Inputs
from gradalign.multiexit.methods.base import Judged, Method, Settings, Stage, run
from gradalign.multiexit.methods.compression.layers import (
    FINE_TUNING,
    first_half,
    layers_of,
    on_labels,
    replace_layers,
    with_layers,
)
from gradalign.rules import Sum

_START = 0.3
_GROWTH = 6e-4  # a step


class Replaced(nn.Module):
    """A layer in the place of two, which in training run instead of it unless a coin, one for the batch, says so.

    Attributes:
        probability: That the layer runs.
    """

    def __init__(self, successor: nn.Module, predecessors: Iterable[nn.Module]) -> None:
        super().__init__()
        self.successor = successor
        self.predecessors = nn.ModuleList(predecessors)
        self.probability = _START

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the state after the layer, or after the two, (n, L, H)."""
        # The generator of the CPU, which each step seeds: no wait for an accelerator.
        replaced = not self.training or torch.rand(()).item() < self.probability
        for layer in (self.successor,) if replaced else self.predecessors:
            after = layer(hidden, mask)
            hidden = after[0] if isinstance(after, tuple) else after
        return hidden


def with_successors(model: nn.Module, settings: Settings) -> nn.Module:
    """Return an encoder whose layer k, counted from 1, is a copy of layer k in the place of layers 2 k - 1 and 2 k.

    Raises:
        ValueError: The number of layers is odd.
    """
    layers = layers_of(model)
    if len(layers) % 2:
        raise ValueError(f"`backbone` must have an even number of layers for theseus, got {len(layers)}.")
    made = with_layers(model, first_half(model))
    replace_layers(made, lambda layer, number: Replaced(layer, layers[2 * number : 2 * number + 2]))
    # In the state, so that a run that was stopped goes on counting. It stays on the CPU, where it is read each step.
    made.register_buffer("steps", torch.zeros((), dtype=torch.long))
    return made


def successors(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the layers that take the others' place."""
    layers = dict.fromkeys(layers_of(model))
    return [parameter for layer in layers for parameter in cast(Replaced, layer).successor.parameters()]


def replacing(model: nn.Module, inputs: Inputs, settings: Settings) -> Tensor:
    """Return the logits (1, B, C) of the network with each successor in with p = min(1, 0.3 + 6e-4 step)."""
    steps = cast(Any, model).steps
    for layer in layers_of(model):
        cast(Replaced, layer).probability = min(1.0, _START + _GROWTH * int(steps))
    steps += 1
    logits = run(model, inputs, settings)
    if logits.requires_grad:
        return logits
    # All coins fell for the frozen layers: the gradient is zero, and the step is one of momentum and decay alone.
    return logits + 0.0 * torch.stack([parameter.sum() for parameter in successors(model)]).sum()


def successors_alone(model: nn.Module, work: Judged) -> nn.Module:
    """Return the encoder of the layers that took the others' place."""
    return with_layers(model, range(len(layers_of(model))), lambda layer: cast(Replaced, layer).successor)


METHODS = (
    Method(
        "theseus",
        "after fine-tuning, copies of the first half of the layers take the place of two each, at random",
        (FINE_TUNING, Stage(on_labels, lambda settings: Sum(), successors, replacing, with_successors)),
        finish=successors_alone,
        kinds=("text",),
    ),
)
