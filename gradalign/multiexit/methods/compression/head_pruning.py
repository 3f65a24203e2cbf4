"""Attention heads masked round by round, the least important first, until the held-out score falls.

References: Michel et al., Are Sixteen Heads Really Better than One?, NeurIPS 2019, arXiv:1905.10650.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradalign.multiexit.inference import Inputs, evaluating
from gradalign.multiexit.methods.base import Judged, Method, Settings, run
from gradalign.multiexit.methods.compression.layers import FINE_TUNING, layers_of
from gradalign.multiexit.objectives import exit_losses

_SHARE = 0.1  # of all heads, masked a round
_LEAST = 0.9  # of the first score
_BATCHES = 128  # that importance is estimated on, at most
_PROJECTIONS = ("attention.output.dense", "attention.dense", "attention.out_lin")


def projections(model: nn.Module) -> list[nn.Linear]:
    """Return what joins the heads of each layer, a matrix of H columns; of a layer that is run several times, once."""
    return [
        cast(nn.Linear, module)
        for layer in dict.fromkeys(layers_of(model))
        for name, module in layer.named_modules()
        if name.endswith(_PROJECTIONS)
    ]


def head_count(model: nn.Module) -> int:
    """Return how many heads a layer has."""
    return int(cast(Any, model).backbone.config.num_attention_heads)


@contextmanager
def masked(modules: Sequence[nn.Linear], masks: Sequence[Tensor]) -> Iterator[None]:
    """Multiply what each head gives to the projection by its mask.

    Args:
        modules: Of ``projections``.
        masks: For each module (B, heads), a number for each row and head.
    """

    def hook(mask: Tensor) -> Any:  # noqa: ANN401 (a hook of torch)
        def multiply(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            heads = arguments[0].unflatten(-1, (mask.shape[1], -1))  # (B, L, heads, H / heads)
            return ((heads * mask[:, None, :, None]).flatten(-2),)

        return multiply

    handles = [module.register_forward_pre_hook(hook(mask)) for module, mask in zip(modules, masks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sensitivity(model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
    """Return sum over rows of |dL / dm_h|, (layers, heads), L a row's loss at the last exit, its masks m at 1."""
    modules = projections(model)
    new = modules[0].weight.detach().new_ones
    masks = [new(len(labels), head_count(model)).requires_grad_() for _ in modules]
    with masked(modules, masks), torch.enable_grad():
        logits = run(model, inputs, Settings())
        # A row's loss depends on its own masks alone, so the gradient of the sum holds each row's.
        loss = exit_losses(logits[-1:], labels).sum() * len(labels)
        gradients = torch.autograd.grad(loss, masks)
    return torch.stack([gradient.abs().sum(0) for gradient in gradients])


def normalised(sensitivities: Tensor) -> Tensor:
    """Return the importance of heads (layers, heads): each layer's scaled to length 1, then all to [0, 1].

    The authors divide by the number of tokens first; the lengths take that out again.
    """
    least = torch.finfo(sensitivities.dtype).tiny  # a layer whose heads are all masked has length 0
    scaled: Tensor = sensitivities / sensitivities.norm(dim=1, keepdim=True).clamp_min(least)
    return (scaled - scaled.min()) / (scaled.max() - scaled.min()).clamp_min(least)


def importance(model: nn.Module, work: Judged) -> Tensor:
    """Return the importance of heads, (layers, heads), on the first training batches, without dropout."""
    with evaluating(model):
        batches = (work.batch(step, 0, 1) for step in range(min(_BATCHES, work.steps_an_epoch)))
        return normalised(torch.stack([sensitivity(model, inputs, labels) for inputs, labels, _ in batches]).sum(0))


def mask_heads(model: nn.Module, gone: Tensor) -> None:
    """Mask heads for good.

    The projection gives W (m_1 x_1, ..., m_h x_h) + b = sum_h m_h W_h x_h + b with W_h the columns of head h: a mask of
    zero is the same as W_h = 0. So the network stays a plain encoder; it computes as many heads as before.

    Args:
        model: A ``MultiExitEncoder``, which is changed.
        gone: (layers, heads), bool.
    """
    with torch.no_grad():
        for module, heads in zip(projections(model), gone, strict=True):
            columns = heads.repeat_interleave(module.in_features // len(heads))
            module.weight[:, columns.to(module.weight.device)] = 0.0


def pruned(model: nn.Module, work: Judged) -> nn.Module:
    """Mask the least important tenth of the heads a round, while the held-out score is 90 % of the first, or more."""
    gone = torch.zeros(len(projections(model)), head_count(model), dtype=torch.bool)
    a_round = max(1, int(_SHARE * gone.numel()))
    first = _score(model, work)
    least = _LEAST * first
    while first > 0 and int((~gone).sum()) > a_round:  # of a score of 0, as Matthews' of one answer, nothing can fall
        values = importance(model, work).cpu().masked_fill(gone, float("inf"))
        lowest = values.flatten().argsort(stable=True)[:a_round]
        before = _weights(model)
        mask_heads(model, torch.zeros(gone.numel(), dtype=torch.bool).index_fill(0, lowest, True).view_as(gone))
        if _score(model, work) < least:
            _restore(model, before)
            break
        gone.view(-1)[lowest] = True
    return model


def _score(model: nn.Module, work: Judged) -> float:
    return float(work.scores(*work.logits(model, "held_out"))[work.main][-1])


def _weights(model: nn.Module) -> Mapping[nn.Linear, Tensor]:
    return {module: module.weight.detach().clone() for module in projections(model)}


def _restore(model: nn.Module, weights: Mapping[nn.Linear, Tensor]) -> None:
    with torch.no_grad():
        for module in projections(model):
            module.weight.copy_(weights[module])


METHODS = (
    Method(
        "head-pruning",
        "fine-tuning, then the least important attention heads masked while the held-out score is 90 % or more",
        (FINE_TUNING,),
        finish=pruned,
        kinds=("text",),
    ),
)
