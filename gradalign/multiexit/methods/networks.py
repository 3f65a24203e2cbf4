"""Parts of a network with exits: which parameters are whose, and how to run some of its exits alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from gradalign.multiexit.inference import Inputs
from gradalign.multiexit.methods.base import Settings


class LayeredModel(Protocol):
    """A network with exits whose layers and heads run apart, as ``MultiExitResNet``; exits are counted from 1.

    Attributes:
        num_exits: M.
        heads: (M,), the exits' own parts; what all exits share is no part of them.
    """

    num_exits: int
    heads: nn.ModuleList

    def start(self, inputs: Any, /) -> Any:  # noqa: ANN401 (each network has inputs and a hidden state of its own)
        """Return the hidden state before the first layer."""

    def layers(self, hidden: Any, /, exit: int) -> Any:  # noqa: ANN401
        """Run the layers from the exit before to this one."""

    def classify(self, hidden: Any, /, exit: int) -> Tensor:  # noqa: ANN401
        """Return an exit's logits (B, C)."""


def layered(model: nn.Module) -> LayeredModel:
    """Return the network as one whose layers and heads run apart."""
    return cast(LayeredModel, model)


def internal_heads(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all heads but the last.

    Raises:
        ValueError: There are none.
    """
    heads = layered(model).heads[:-1]
    if not heads:
        raise ValueError("`exits` must name an exit before the last, got none; this method trains those alone.")
    return list(heads.parameters())


def all_but_internal_heads(model: nn.Module) -> Iterable[nn.Parameter]:
    """Return the parameters of the backbone, with what all exits share, and of the last head."""
    internal = {id(parameter) for parameter in internal_heads(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in internal]


def some_exits(model: nn.Module, inputs: Inputs, exits: Sequence[int]) -> Tensor:
    """Return the logits of these exits, (len(exits), B, C); no layer after the last of them is run.

    Args:
        model: The network.
        inputs: What it takes.
        exits: Ascending, from 1 to M.
    """
    network, logits = layered(model), []
    hidden = network.start(inputs)
    for exit in range(1, exits[-1] + 1):
        hidden = network.layers(hidden, exit)
        if exit in exits:
            logits.append(network.classify(hidden, exit))
    return torch.stack(logits)


def last_exit(model: nn.Module, inputs: Inputs, settings: Settings) -> Tensor:
    """Return the logits of the last exit alone, (1, B, C)."""
    return some_exits(model, inputs, (layered(model).num_exits,))


def frozen_modules(module: nn.Module, inside: bool = False) -> list[nn.Module]:
    """Return the modules whose parameters are all frozen, with the parameterless ones, dropout say, that they hold."""
    parameters = list(module.parameters())
    frozen = not any(p.requires_grad for p in parameters) if parameters else inside
    inner = [part for child in module.children() for part in frozen_modules(child, frozen)]
    return [module, *inner] if frozen else inner
