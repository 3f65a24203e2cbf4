"""Which gradients are nobody else's, so that each can be changed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from gradalign.collectors.parameters import Layout
from gradalign.distributed import Row


class Owner:
    """Tells which gradients of one step are nobody else's, and copies the others, so that each can be changed.

    Args:
        layout: The parameters.
        disjoint: Gradients that share a storage are different pieces of it, unless they begin at the same place.
    """

    def __init__(self, layout: Layout, *, disjoint: bool = False) -> None:
        self._layout = layout
        self._disjoint = disjoint
        self._places: dict[int, tuple[int, int]] = {}  # some memory: whose it is, by row and parameter

    def own(self, row: Row, members: Sequence[int]) -> None:
        """Put into ``row`` gradients in the layout's strides that share memory with none seen before.

        Autograd returns one tensor for two parameters that are only ever added, and a function of the user's may
        return a tensor that it keeps. As torch's own accumulation into ``p.grad`` does, this goes by who refers to
        the tensor; a view that a function keeps of its result goes unseen, there and here.
        """
        for i in members:
            mine = (id(row), i)
            if self._layout.is_laid_out(i, row[i]):
                if _references(row, i) > _UNSHARED or self._places.get(self._memory(row[i]), mine) != mine:
                    row[i] = row[i].clone()
            else:
                row[i] = self._layout.laid_out(i, row[i])
            self._places[self._memory(row[i])] = mine

    def _memory(self, gradient: Tensor) -> int:
        return gradient.data_ptr() if self._disjoint else gradient.untyped_storage().data_ptr()


def is_exclusive(tensor: Tensor) -> bool:
    """Return whether no other tensor shares this one's memory; False where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(tensor.untyped_storage()._cdata) <= 2  # the tensor and the storage asked


def _references(row: Sequence[object], i: int) -> int:
    return sys.getrefcount(row[i])


_UNSHARED = _references([object()], 0)
