"""Exiting by patience over exits that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradalign.errors import finite_number
from gradalign.multiexit.inference import Policy
from gradalign.multiexit.objectives import check_count


@dataclass(frozen=True)
class Patience(Policy):
    """Leave once so many exits in a row have agreed with the one before.

    A row's count is 0 at exit 1; at exit i > 1 it grows by 1 if the exit's label is that of exit i - 1, else
    it returns to 0. The row leaves when the count is ``patience``, so at exit patience + 1 at the earliest.

    Args:
        patience: At least 1; M - 1 or more never leaves early.
        tolerance: For regression (C = 1), in the unit of the output: exits agree if abs(y_i - y_{i-1}) <
            tolerance.

    Raises:
        TypeError: ``patience`` is no integer, or ``tolerance`` no number.
        ValueError: ``patience`` is below 1, ``tolerance`` negative or not finite or, when called, C = 1
            without ``tolerance`` or C > 1 with it.

    References:
        Zhou et al., BERT Loses Patience: Fast and Robust Inference with Early Exit, NeurIPS 2020,
        arXiv:2006.04152.

    >>> labels = torch.tensor([[0, 1], [0, 0], [1, 0], [1, 0]])  # of 4 exits and 2 rows
    >>> Patience(2)(torch.nn.functional.one_hot(labels).float())
    tensor([4, 4])
    >>> Patience(1)(torch.nn.functional.one_hot(labels).float())
    tensor([2, 3])
    """

    patience: int
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_count("patience", self.patience)
        if self.tolerance is not None:
            finite_number("tolerance", self.tolerance, low=0.0)

    def check(self, num_exits: int, num_classes: int) -> None:
        """Raise ValueError unless ``tolerance`` is given for a single output and only then."""
        if (self.tolerance is None) == (num_classes == 1):
            got = f"{num_classes} classes" if num_classes > 1 else "one output, C = 1"
            raise ValueError(f"`tolerance` must be given for regression alone, got {self} and {got}.")

    def step(self, logits: Tensor, exit: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Count the exits in a row that agree, and let rows leave whose count is full."""
        said = logits.argmax(-1) if self.tolerance is None else logits.squeeze(-1).double()
        count = torch.zeros_like(said, dtype=torch.int64)
        if state:
            before = state["said"]
            agrees = said == before if self.tolerance is None else (said - before).abs() < self.tolerance
            count = (state["count"] + 1).where(agrees, 0)
        state.update(said=said, count=count)
        return count == self.patience, logits

    def settings(self, logits: Tensor) -> tuple[str, Sequence[float]]:
        """Try every patience up to the one that never leaves early."""
        return "patience", range(max(len(logits) - 1, 1), 0, -1)
