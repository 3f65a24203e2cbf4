"""Losses of one of several micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def divided(losses: T, number: int) -> T:
    """Return named losses, each divided by the number of micro-batches, so that their sum is a mean.

    Args:
        losses: As ``GradientAligner.backward`` takes them. What it would refuse is returned as it is, for it to say so.
        number: How many micro-batches make a step.
    """
    return _divided(losses, number) if number > 1 else losses


def divided_probe(probe: Any, number: int) -> Any:  # noqa: ANN401, what is no function is the aligner's to refuse
    """Return a probe whose losses are divided by the number of micro-batches; None where there is none."""
    if number == 1 or not callable(probe):
        return probe
    evaluate: Callable[[], Any] = probe
    return lambda: _divided(evaluate(), number)


def _divided(losses: Any, number: int) -> Any:  # noqa: ANN401
    if isinstance(losses, Tensor):
        return losses / number
    if isinstance(losses, Mapping):
        return {name: _divided(group, number) for name, group in losses.items()}
    if isinstance(losses, list | tuple):
        return [_divided(term, number) for term in losses]
    return losses
