"""Rules that are no function of the Gramian: they see the gradients themselves.

Shapes: K rows (P,), the gradients of one block; the aligned gradient is (P,).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.algebra import wide
from gradalign.rules.base import BaseRule, made
from gradalign.rules.kinds import Memory, Stateful

CHUNK = 2**16  # elements of each row that are taken at once, so that no second copy of all rows is made


class RowRule(BaseRule):
    """Map the K gradients to the aligned gradient.

    It needs the rows that only the stacked collector keeps. A subclass writes ``_aligned``, and ``plain_weights`` where
    1/K is not right.
    """

    def __call__(
        self, rows: Sequence[Tensor] | Tensor, names: Sequence[str] | None = None, *, block: int = 0
    ) -> Tensor:
        """Return the aligned gradient.

        Args:
            rows: K tensors (P,), or one (K, P), of one floating dtype and device. They are not changed.
            names: The K groups' names, needed only by an anchor given by name.
            block: Which block of parameters these are the gradients of; a rule that remembers keeps each apart.

        Returns:
            (P,), dtype and device of the rows, memory of its own. An element that is NaN or infinite in any row is
            not finite in it.

        Raises:
            TypeError: ``rows`` are no floating-point tensors.
            ValueError: ``rows`` have other shapes, or K does not fit the rule, its memory or ``names``.
        """
        self._check(rows, names)
        dtype = rows[0].dtype
        # Half precision is too coarse to sum in: compute in float32, return what was asked for.
        wide = [row.detach().to(torch.promote_types(dtype, torch.float32)) for row in rows]
        poison = torch.zeros_like(wide[0])
        for row in wide:
            poison.add_(row, alpha=0)  # 0, or NaN where an element is not finite
        aligned = made(self._aligned(wide, names, block), wide[0].shape, f"{type(self).__name__}._aligned")
        return (aligned + poison).to(dtype)

    @abstractmethod
    def _aligned(self, rows: Sequence[Tensor], names: Sequence[str] | None, block: int) -> Tensor:
        """Return the aligned gradient (P,) of K checked rows (P,) of at least float32."""

    def _check(self, rows: Sequence[Tensor] | Tensor, names: Sequence[str] | None) -> None:
        if not isinstance(rows, Tensor | Sequence) or len(rows) == 0:
            raise TypeError(f"`rows` must be K tensors (P,) or one (K, P), got {type(rows).__name__}.")
        for row in rows:
            if not isinstance(row, Tensor) or not row.is_floating_point():
                kind = row.dtype if isinstance(row, Tensor) else type(row).__name__
                raise TypeError(f"`rows` must be floating-point tensors, got {kind}; pass the gradients, not G.")
        shapes = sorted({tuple(row.shape) for row in rows})
        if len(shapes) > 1 or len(shapes[0]) != 1:
            raise ValueError(f"`rows` must be K tensors of one shape (P,), got shapes {shapes}; flatten each gradient.")
        if names is not None and len(names) != len(rows):
            raise ValueError(f"`names` must name the {len(rows)} groups of `rows`, got {list(names)}.")
        self.check_groups(len(rows), names)


@dataclass(frozen=True, eq=False)
class StatefulRowRule(Stateful, RowRule):
    """A rule of rows that remembers: it writes ``_begin`` and ``_step``, both pure, as ``StatefulRule`` does.

    Rows that are not finite leave the memory as it was. What ``elementwise`` lists of the memory ends in P.
    """

    elementwise: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _begin(self, rows: Sequence[Tensor], names: Sequence[str] | None) -> Memory:
        """Return the memory before the first call."""

    @abstractmethod
    def _step(self, rows: Sequence[Tensor], memory: Memory, names: Sequence[str] | None) -> tuple[Tensor, Memory]:
        """Return the aligned gradient (P,) and the next memory."""

    def _aligned(self, rows: Sequence[Tensor], names: Sequence[str] | None, block: int) -> Tensor:
        memory = self._recall(block, rows[0], lambda: self._begin(rows, names))
        sizes = {value.shape[-1] for key, value in memory.items() if key in self.elementwise}
        if sizes - {rows[0].numel()}:
            raise ValueError(
                f"`rows` must keep the {sizes.pop()} elements that {type(self).__name__} remembers for block {block},"
                f" got {rows[0].numel()}; make a new rule for another scope, granularity or"
                " other parameters."
            )
        aligned, following = self._step(rows, memory, names)
        healthy = torch.stack([row.isfinite().all() for row in rows]).all()
        kept = {key: torch.where(healthy, value, memory[key]) for key, value in following.items()}
        self._remember(block, kept, len(rows), names)
        return aligned


def products(rows: Sequence[Tensor]) -> Tensor:
    """Return the Gramian (K, K) of the rows, summed in float64 (float32 on devices that have none) by chunks."""
    G = wide(rows[0].new_zeros(len(rows), len(rows)))
    for start in range(0, rows[0].numel(), CHUNK):
        chunk = wide(torch.stack([row[start : start + CHUNK] for row in rows]))
        G.addmm_(chunk, chunk.T)
    return G


def share_of_present(share: float, calls: Tensor, like: Tensor) -> Tensor:
    """Return by how much an average moves towards what is new: all the way at the first call, else ``share``."""
    return torch.where(calls == 0, like.new_ones(()), like.new_full((), share))
