"""What a row costs: multiply-accumulates of an encoder with exits."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

from gradalign.multiexit.text import backbones
from gradalign.multiexit.text.heads import Head

if TYPE_CHECKING:
    from gradalign.multiexit.text.encoder import MultiExitEncoder


def encoder_macs(model: MultiExitEncoder, length: int, *, heads: bool = True) -> tuple[int, ...]:
    """Return the multiply-accumulates of a row of so many tokens, up to and including each exit, (M,).

    A linear layer costs its weights a token; attention 2 L^2 H: L^2 products of width H for the scores, and as many for
    the values, whatever the number of attention heads.
    """
    own, backbone = model.backbone.config, model.backbone
    family = backbones.family_of(own)
    project = family.project(backbone)
    total = 0 if project is None else length * _weights(project)
    attention = 2 * length**2 * int(own.hidden_size)
    pooler = 0 if model.pooler is None else _weights(model.pooler)
    counts, done = [], 0
    layers = family.layers(backbone)
    for exit, end in enumerate(model.exit_layers, 1):
        total += sum(length * _weights(layer) + attention for layer in layers[done:end])
        done = end
        head = cast(Head, model.heads[exit - 1]).macs(length) + pooler
        counts.append(total + head)
        if heads:
            total += head
    return tuple(counts)


def _weights(module: nn.Module) -> int:
    """Return the weights of a module's linear layers."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
