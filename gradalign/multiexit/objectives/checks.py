"""Checks of logits, labels and counts."""

from __future__ import annotations

import torch
from torch import Tensor


def check_logits(logits: object) -> tuple[int, int, int]:
    """Return (M, B, C) of stacked logits, or raise unless they are that, floating, with M, C >= 1."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"`logits` must be one tensor (exits, rows, classes), got {type(logits).__name__}; write"
            " torch.stack(logits)."
        )
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be floating, got {logits.dtype}; give the scores before the softmax.")
    if logits.ndim != 3 or 0 in (logits.shape[0], logits.shape[2]):
        raise ValueError(
            "`logits` must be (exits, rows, classes), with an exit and a class at least, got shape"
            f" {tuple(logits.shape)}; stack the exits' logits with torch.stack."
        )
    M, B, C = logits.shape
    return M, B, C


def check_labels(labels: object, num_rows: int, num_classes: int) -> None:
    """Raise unless ``labels`` is an integer tensor (num_rows,); on the CPU, unless in [0, num_classes)."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"`labels` must be a tensor, got {labels!r}; write torch.tensor(labels).")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must be integer class numbers, got {labels.dtype}; write .long().")
    if labels.shape != (num_rows,):
        raise ValueError(
            f"`labels` must be ({num_rows},), one for each row, got shape {tuple(labels.shape)}; take"
            " those of the batch that gave the logits."
        )
    # Looking at the values would make the host wait for an accelerator, and break a compiled graph.
    if labels.device.type == "cpu" and num_rows and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"`labels` must be in 0..{num_classes - 1}, got {low} to {high}; number the classes from 0."
            )


def check_count(argument: str, value: object) -> int:
    """Return ``value``, or raise unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{argument}` must be an integer, got {value!r} ({type(value).__name__}).")
    if value < 1:
        raise ValueError(f"`{argument}` must be at least 1, got {value}.")
    return value


def check_nonempty(logits: object) -> tuple[int, int, int]:
    """Return (M, B, C) as ``check_logits`` does, or raise where there is no row."""
    M, B, C = check_logits(logits)
    if B == 0:
        raise ValueError(f"`logits` must hold a row at least, got {(M, B, C)}; skip empty batches.")
    return M, B, C


def at_least_float32(logits: Tensor) -> Tensor:
    """Return half-precision logits in float32: the exits' differences are lost in fewer digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
