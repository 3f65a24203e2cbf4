"""GradDrop: every element of the step takes one sign, drawn by how much the gradients agree on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import quotient
from gradalign.errors import finite_number, finite_numbers
from gradalign.rules.base import listed
from gradalign.rules.kinds import Random
from gradalign.rules.rows import RowRule


@dataclass(frozen=True, eq=False)
class GradDrop(Random, RowRule):
    """Keep, element by element, the gradients of one sign, positive with probability P, and add them.

    P = (1 + sum_i g_i / sum_i norm(g_i)) / 2 for each element, U uniform on [0, 1]: the positive parts are kept where
    P > U, the negative where not. A leak l_i lets the share l_i of g_i through as it is.

    Guarantees: without leak the elements of d have the signs that were drawn; with one leak for all, the mean of d over
    the draws is the sum.

    Args:
        leak: Number, or one for each group, in [0, 1].
        seed: Seed of the rule's own generator, which seeds each call's draws on the rows' device.

    Note:
        The gradients are the parameters', lines 10 to 15 of the algorithm; the paper applies it at a layer's
        activations, and lets P pass through a function, here the identity.

    References:
        Chen et al., Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout, NeurIPS 2020,
        arXiv:2010.06808, Algorithm 1.

    >>> GradDrop()(torch.tensor([[1.0, -1.0], [2.0, -3.0]]))  # of one sign: nothing is dropped
    tensor([ 3., -4.])
    """

    leak: float | Sequence[float] = field(default=0.0)

    name: ClassVar[str] = "graddrop"
    equivariant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.leak, int | float):
            object.__setattr__(self, "leak", finite_number("leak", self.leak, 0.0, 1.0))
        else:
            leaks = finite_numbers("leak", self.leak, 0.0)
            object.__setattr__(self, "leak", tuple(finite_number("leak", leak, 0.0, 1.0) for leak in leaks))

    def check_groups(self, num_groups: int, names: Sequence[str] | None) -> None:
        """Raise ValueError unless there is one leak for each group, or one for all."""
        super().check_groups(num_groups, names)
        if isinstance(self.leak, tuple) and len(self.leak) != num_groups:
            raise ValueError(
                f"`leak` must be one number or one for each of the {num_groups} loss groups{listed(names)},"
                f" got {len(self.leak)}."
            )

    def _aligned(self, rows: Sequence[Tensor], names: Sequence[str] | None, block: int) -> Tensor:
        total, size = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
        for row in rows:
            total += row
            size += row.abs()
        purity = (1 + quotient(total, size)) / 2
        draws = self._uniform(rows[0])
        positive = purity > draws
        negative = ~positive  # where P = U = 0 too: of all negative gradients none is dropped
        d = torch.zeros_like(total)
        leaks = self.leak if isinstance(self.leak, tuple) else (self.leak,) * len(rows)
        for row, leak in zip(rows, leaks, strict=True):
            kept = torch.where((positive & (row > 0)) | (negative & (row < 0)), row, 0.0)
            d += torch.lerp(kept, row, leak) if leak else kept
        return d

    def _uniform(self, like: Tensor) -> Tensor:
        """Return numbers drawn from [0, 1), shaped as ``like``, on its device."""
        seed = int(torch.randint(2**62, (), generator=self._generator))
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    def plain_weights(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return ones: where the signs agree nothing is dropped."""
        return (1.0,) * len(names)
