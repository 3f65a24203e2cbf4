"""Encoders of some of an encoder's layers, with one exit at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradalign.multiexit.methods.base import Settings, Stage, Step
from gradalign.multiexit.objectives import exit_losses
from gradalign.rules import Sum


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that a ``MultiExitEncoder`` runs as its layers, in order; ALBERT runs one several times."""
    from gradalign.multiexit.text import backbones  # noqa: PLC0415 (needs transformers, and no image run has them)

    backbone: Any = model.backbone
    return backbones.family_of(backbone.config).layers(backbone)


def with_layers(
    model: nn.Module, kept: Sequence[int], plain: Callable[[nn.Module], nn.Module] = lambda layer: layer
) -> nn.Module:
    """Return a new encoder of some of the layers and one exit, the last one, with the weights that they have.

    Args:
        model: A ``MultiExitEncoder``, which is left as it is.
        kept: The layers, from 0, ascending.
        plain: Makes of a layer that a stage has wrapped the layer as the backbone has it.
    """
    source: Any = model
    config = copy.deepcopy(source.config)
    backbone = config.backbone_config
    backbone.num_hidden_layers = len(kept)
    config.backbone, config.exits = backbone.to_dict(), []
    with torch.random.fork_rng(devices=[]):  # the new weights are drawn, and then written over
        made: Any = type(source).from_config(config)
    state = made.state_dict()
    state |= {
        name: value for name, value in source.state_dict().items() if name in state and not name.startswith("heads.")
    }
    made.load_state_dict(state)
    layers = layers_of(source)
    for new, old in zip(layers_of(made), kept, strict=True):
        new.load_state_dict(plain(layers[old]).state_dict())
    head = source.heads[-1].state_dict()
    if "mix" in head:  # a weight for each layer
        head["mix"] = head["mix"][list(kept)]
    made.heads[0].load_state_dict(head)
    made.tokenizer = source.tokenizer
    parameter = next(source.parameters())
    nn.Module.to(made, parameter.device, parameter.dtype)
    made.train(source.training)
    return made  # type: ignore[no-any-return]


def replace_layers(model: nn.Module, made: Callable[[nn.Module, int], nn.Module]) -> None:
    """Put another module in the place of each layer.

    Args:
        model: A ``MultiExitEncoder``, which is changed.
        made: Makes the other module of the layer and its number, from 0; for a layer that is run several times, once.
    """
    layers = layers_of(model)
    paths = {module: path for path, module in model.named_modules()}
    for layer in dict.fromkeys(layers):
        parent, _, name = paths[layer].rpartition(".")
        setattr(model.get_submodule(parent), name, made(layer, layers.index(layer)))


def first_half(model: nn.Module) -> range:
    """Return the first half of the layers, rounded down: 6 of 12.

    Raises:
        ValueError: There is one layer alone.
    """
    depth = len(layers_of(model))
    if depth < 2:
        raise ValueError("`backbone` must have two layers at least, got 1; this method halves them.")
    return range(depth // 2)


def whole(model: nn.Module, settings: Settings) -> nn.Module:
    """Return a new encoder of all layers, with the last exit alone."""
    return with_layers(model, range(len(layers_of(model))))


def on_labels(step: Step) -> dict[str, Tensor]:
    """Return the loss on the labels, of the one exit."""
    return {"ce": exit_losses(step.logits, step.labels).sum()}


FINE_TUNING = Stage(on_labels, lambda settings: Sum(), prepare=whole)
