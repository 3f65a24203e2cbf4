"""Fixed weights: the sum, the mean, and weights that the user gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradalign.errors import finite_numbers
from gradalign.rules.base import Rule, listed
from gradalign.rules.kinds import fixed


@dataclass(frozen=True, eq=False)
class Sum(Rule):
    """Add the gradients, as ``sum(losses).backward()`` does.

    w = 1. Use it to watch conflicts, in the aligner's report, without changing the training.

    Guarantees: none about conflict; d = sum_i g_i.

    >>> Sum()(torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))
    tensor([1., 1.])
    """

    name: ClassVar[str] = "sum"

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        return fixed((1.0,) * G.shape[-1], G)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return ones."""
        return (1.0,) * len(names)


@dataclass(frozen=True, eq=False)
class Mean(Rule):
    """Average the gradients.

    w = 1/K, so that the step's length does not grow with the number of loss groups.

    Guarantees: none about conflict; norm(d) <= max_i norm(g_i).

    >>> Mean()(torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))
    tensor([0.5000, 0.5000])
    """

    name: ClassVar[str] = "mean"

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        return fixed((1 / G.shape[-1],) * G.shape[-1], G)


@dataclass(frozen=True, eq=False)
class Constant(Rule):
    """Weight the gradients by given numbers, as ``sum(w * loss)`` does.

    Guarantees: none about conflict; d = sum_i w_i g_i.

    Args:
        weights: (K,) finite numbers, dimensionless, in the order of the loss groups. Kept as a tuple.

    Raises:
        TypeError: ``weights`` is no sequence of numbers.
        ValueError: ``weights`` is empty or not finite, or, when called, K differs from their number.

    >>> Constant([0.7, 0.3])(torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))
    tensor([0.7000, 0.3000])
    """

    weights: Sequence[float]

    name: ClassVar[str] = "constant"
    equivariant: ClassVar[bool] = False  # the weights belong to positions

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", finite_numbers("weights", self.weights))

    def _weights(self, G: Tensor, names: Sequence[str] | None) -> Tensor:
        return fixed(self.weights, G)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the weights given."""
        return tuple(self.weights)

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless there is one weight for each group."""
        if num_groups != len(self.weights):
            raise ValueError(
                f"`weights` must hold one number for each of the {num_groups} loss groups{listed(names)},"
                f" got {len(self.weights)}."
            )
