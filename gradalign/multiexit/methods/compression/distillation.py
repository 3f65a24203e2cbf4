"""Half an encoder, trained on the labels alone, or taught by the whole encoder, which was trained first.

Shapes: B rows, C classes, H hidden width, L layers of the teacher, S = L / 2 of the student.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradalign.multiexit.inference import Inputs
from gradalign.multiexit.methods.base import Method, Settings, Stage, Step, run
from gradalign.multiexit.methods.compression.layers import FINE_TUNING, first_half, layers_of, on_labels, with_layers
from gradalign.multiexit.methods.taught import weighted_sum
from gradalign.multiexit.objectives import distillation
from gradalign.rules import Constant, Sum


def first_layers(model: nn.Module, settings: Settings) -> nn.Module:
    """Return the first half of the layers with the last exit."""
    return with_layers(model, first_half(model))


def every_other_layer(model: nn.Module, settings: Settings) -> nn.Module:
    """Return layers 0, 2, 4, ... with the last exit, half of them, rounded down."""
    return with_layers(model, [2 * layer for layer in first_half(model)])


def taught(step: Step) -> dict[str, Tensor]:
    """Return the loss on the labels, and as ``kd`` what the teacher's logits teach, T^2 KL."""
    with torch.no_grad():
        teacher = run(_teacher(step), _inputs(step), step.settings)
    return on_labels(step) | {"kd": distillation(step.logits, teacher[-1], step.settings.temperature).sum()}


def first_tokens(model: nn.Module, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the logits of the one exit, (1, B, C), and the first token's state after each layer, (layers, B, H)."""
    from gradalign.multiexit.text import backbones  # noqa: PLC0415 (needs transformers)

    encoder = cast(Any, model)
    state = encoder.start(inputs)
    hidden, firsts = state["hidden"], []
    refused = backbones.penalty(state["mask"], hidden.dtype)
    for layer in layers_of(model):
        hidden = backbones.run(layer, hidden, refused)
        firsts.append(hidden[:, 0])
    cls = torch.stack(firsts)
    end = {"hidden": hidden, "mask": state["mask"], "cls": cls.transpose(0, 1)}
    return encoder.classify(end, 1).unsqueeze(0), cls


def patiently_taught(step: Step) -> dict[str, Tensor]:
    """Return the loss on the labels, ``kd`` from the teacher's logits and ``patience`` from its layers.

    Patience is the mean over student layers k = 1..S-1, rows and hidden units of the squared difference of the first
    token's states after student layer k and teacher layer 2 k, each scaled to length 1.

    Raises:
        ValueError: The student has one layer alone, and so none before its last.
    """
    with torch.no_grad():
        logits, taught_by = first_tokens(_teacher(step), _inputs(step), step.settings)
    states = cast(Tensor, step.states)
    before_last = len(states) - 1
    if before_last == 0:
        raise ValueError("`backbone` must have four layers at least for bert-pkd, got a student of 1.")
    wanted = taught_by[1 : 2 * before_last : 2]  # after layers 2, 4, ..., 2 (S - 1), counted from 1
    patience = F.mse_loss(F.normalize(states[:-1].float(), dim=-1), F.normalize(wanted.float(), dim=-1))
    kd = distillation(step.logits, logits[-1], step.settings.temperature).sum()
    return on_labels(step) | {"kd": kd, "patience": patience}


def patient_sum(settings: Settings) -> Constant:
    """Return the rule of the sum (1 - alpha) ce + alpha kd + beta patience."""
    return Constant((1 - settings.alpha, settings.alpha, settings.beta))


def _teacher(step: Step) -> nn.Module:
    return cast(nn.Module, step.teacher)


def _inputs(step: Step) -> Inputs:
    return cast(Inputs, step.inputs)


METHODS = (
    Method(
        "bert-6l",
        "the first half of the layers, cross-entropy at their end",
        (Stage(on_labels, lambda settings: Sum(), prepare=first_layers),),
        kinds=("text",),
    ),
    # Sanh et al., DistilBERT, 2019, arXiv:1910.01108: the student begins as one of two of the teacher's layers. Their
    # distillation while pretraining is left out.
    Method(
        "distilbert",
        "every other layer of the fine-tuned encoder, which teaches them: its logits, at temperature 2",
        (FINE_TUNING, Stage(taught, weighted_sum, prepare=every_other_layer, has_teacher=True)),
        Settings(alpha=0.5, temperature=2.0),
        kinds=("text",),
    ),
    # Sun et al., Patient Knowledge Distillation, EMNLP 2019, arXiv:1908.09355: the student begins as the first layers
    # of the pretrained encoder; "PKD-Skip" is the choice of layers.
    Method(
        "bert-pkd",
        "the first half of the pretrained layers, taught by the fine-tuned encoder: its logits and every other layer",
        (
            FINE_TUNING,
            Stage(
                patiently_taught,
                patient_sum,
                forward=first_tokens,
                prepare=first_layers,
                has_teacher=True,
                begins_anew=True,
            ),
        ),
        Settings(alpha=0.5, temperature=10.0),
        kinds=("text",),
    ),
)
