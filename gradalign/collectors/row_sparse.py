"""Gradients most of whose rows are zero, as an embedding's are: only what is not zero is kept, multiplied and summed.

Shapes: V rows of D elements, of which n are touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A look at the rows costs a pass, the fastest there is; below this many elements all passes together are short.
_FEWEST_ELEMENTS = 2**20

# Rows that are looked at first. Where these say that many are touched, the others are not looked at.
_SAMPLE = 64

# A gradient is taken as row-sparse where no more than one row in so many is touched.
_TOUCHED_OF = 4


@dataclass(frozen=True, slots=True)
class RowSparse:
    """A matrix (V, D) as the rows that are not zero.

    Attributes:
        index: (n,), which rows these are, ascending.
        values: (n, D).
    """

    index: Tensor
    values: Tensor

    def dense(self, into: Tensor) -> Tensor:
        """Return the matrix, written into memory (V, D)."""
        return into.zero_().index_copy_(0, self.index, self.values.to(into.dtype))

    def on(self, index: Tensor) -> Tensor:
        """Return these rows of the matrix; ``index`` holds all that are not zero, ascending."""
        if len(index) == len(self.index):
            return self.values
        rows = self.values.new_zeros(len(index), self.values.shape[1])
        return rows.index_copy_(0, torch.searchsorted(index, self.index), self.values)

    def plus(self, other: RowSparse) -> RowSparse:
        """Return the sum of two matrices."""
        index = union([self.index, other.index])
        return RowSparse(index, self.on(index) + other.on(index))


def can_be_row_sparse(parameter: Tensor) -> bool:
    """Return whether gradients of a parameter are worth a look at their rows."""
    return (
        parameter.device.type == "cpu"  # an accelerator would have to be waited for
        and parameter.ndim == 2
        and parameter.numel() >= _FEWEST_ELEMENTS
        and parameter.is_contiguous()
    )


def touched_rows(gradient: Tensor) -> Tensor | None:
    """Return the rows of a gradient (V, D) that are not zero, (n,) ascending; None where these are not few.

    NaN is not zero.
    """
    if not gradient.is_contiguous():
        return None
    bits = gradient.view(torch.uint8)
    for looked_at in (bits[:: max(1, len(bits) // _SAMPLE)], bits):
        touched = looked_at.any(1)
        if _TOUCHED_OF * int(touched.count_nonzero()) > len(touched):
            return None
    return touched.nonzero().squeeze(1)


def union(indices: Sequence[Tensor]) -> Tensor:
    """Return the rows that any of these hold, ascending."""
    first, *others = indices
    if all(torch.equal(first, other) for other in others):
        return first
    return torch.unique(torch.cat([first, *others]))  # type: ignore[no-any-return]
