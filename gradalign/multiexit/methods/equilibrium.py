"""Gradient equilibrium: a joint loss whose gradient has one size at every layer, however many exits lie above."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradalign.multiexit.inference import Inputs
from gradalign.multiexit.methods.base import Method, Settings, Stage
from gradalign.multiexit.methods.mutual import cross_entropy
from gradalign.multiexit.methods.networks import layered
from gradalign.rules import Sum


class _Rescaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:  # noqa: ANN401 (torch's own)
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return gradients[0] * ctx.factor, None


def equilibrated(model: nn.Module, inputs: Inputs, settings: Settings) -> Tensor:
    """Return the logits of every exit, (M, B, C), with rescaled gradients.

    The gradient of layer i, counted from 0, is [g_head + (M - i - 1) g_later] / (M - i), where g_head comes back from
    its exit and g_later from the layers above; the heads' own parameters get theirs whole.

    References:
        Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019, arXiv:1908.06294.
    """
    network, logits = layered(model), []
    hidden = network.start(inputs)
    for exit in range(1, network.num_exits + 1):
        above = network.num_exits - exit  # M - i - 1
        hidden = network.layers(hidden, exit)
        logits.append(network.classify(_rescale(hidden, 1 / (above + 1)), exit))
        hidden = _rescale(hidden, above / (above + 1))
    return torch.stack(logits)


def _rescale(hidden: Any, factor: float) -> Any:  # noqa: ANN401 (a tensor, or several by name)
    if isinstance(hidden, Tensor):
        return _Rescaled.apply(hidden, factor) if hidden.requires_grad else hidden  # type: ignore[no-untyped-call]
    return {name: _rescale(tensor, factor) for name, tensor in hidden.items()}


METHODS = (
    Method(
        "gradient-equilibrium",
        "cross-entropy of all exits (Eq. 1), the gradient at each layer rescaled by the exits above",
        (Stage(cross_entropy, lambda settings: Sum(), forward=equilibrated),),
    ),
)
