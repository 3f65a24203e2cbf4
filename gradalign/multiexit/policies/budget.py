"""Budgeted exiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradalign.multiexit.inference import Policy
from gradalign.multiexit.objectives import check_count


@dataclass(frozen=True)
class Budget(Policy):
    """Answer every row at one exit (budgeted exiting).

    Args:
        exit: 1 to M.

    Raises:
        TypeError: ``exit`` is no integer.
        ValueError: ``exit`` is below 1 or, when called, above M.

    >>> Budget(2)(torch.zeros(3, 4, 2))
    tensor([2, 2, 2, 2])
    """

    exit: int

    def __post_init__(self) -> None:
        check_count("exit", self.exit)

    def check(self, num_exits: int, num_classes: int) -> None:
        """Raise ValueError unless there is such an exit."""
        if self.exit > num_exits:
            raise ValueError(f"`exit` must be in 1..{num_exits}, the exits of this network, got {self.exit}.")

    def looks(self, exit: int) -> bool:
        """Look at the one exit alone."""
        return exit == self.exit

    def step(self, logits: Tensor, exit: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Let all rows leave at the exit, none before."""
        return logits.new_full(logits.shape[:1], exit == self.exit, dtype=torch.bool), logits

    def settings(self, logits: Tensor) -> tuple[str, Sequence[float]]:
        """Try every exit."""
        return "exit", range(len(logits), 0, -1)
