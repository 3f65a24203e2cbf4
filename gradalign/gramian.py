"""The Gramian of K gradients, G_ij = <g_i, g_j>, in one pass over them.

Shapes: K rows of P elements each -> (K, K). A row may come in parts, as the gradients of single parameters do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of the scratch that rows are widened into, all rows together. On a CPU 4 MiB in float64, which the caches
# hold, but up to 16 rows no less a row than torch shares out among threads. An accelerator wants few launches.
_CPU_SCRATCH = 2**19
_SHARED_OUT = 2**16
_MOST_ROWS_SHARED_OUT = 16
_ACCELERATOR_SCRATCH = 2**22

# Rows of a batched product are cut into tiles of this many elements, so that threads have something to share.
_TILE = 2**10

# Up to this K, single dot products are faster than one batched product, see benchmarks/gramian.py.
_MOST_ROWS_FOR_DOTS = 3


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that a Gramian has on this device: float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def make_scratch(device: torch.device, most_rows: int) -> Tensor:
    """Return memory for the plans of one device, of up to ``most_rows`` rows.

    They may share it, for each is done with it when it returns.
    """
    return torch.empty(_scratch_size(most_rows, device), dtype=accumulation_dtype(device), device=device)


def _scratch_size(num_rows: int, device: torch.device) -> int:
    least = _SHARED_OUT * min(num_rows, _MOST_ROWS_SHARED_OUT)
    size = max(_CPU_SCRATCH, least) if device.type == "cpu" else _ACCELERATOR_SCRATCH
    return max(size, num_rows * _TILE)


class GramianPlan:
    """How rows whose parts have these shapes go through the scratch, made once and used at every step.

    Each piece of the rows is widened to float64 before it is multiplied. A product of two float32 numbers is exact
    in float64, so that what is lost is the rounding of a float64 sum; nor do the switches that lower the precision of
    float32 products (``torch.set_float32_matmul_precision``) reach it. One float32 product over whole rows, J @ J.T,
    drifts over millions of elements, see ``benchmarks/gramian.py``.

    Args:
        shapes: The parts' shapes, the same in every row. A part of more than ``largest_whole`` elements has to be flat.
        num_rows: K.
        scratch: From ``make_scratch``.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], num_rows: int, scratch: Tensor) -> None:
        self._fused = _fused_kernel(num_rows, scratch.device)
        self._zero = scratch.new_zeros(num_rows, num_rows)
        room = largest_whole(num_rows, scratch.device)
        table = scratch[: room * num_rows].view(num_rows, room)
        self._steps = [] if self._fused else [_Step(pieces, table, shapes) for pieces in fill(shapes, room)]

    def __call__(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the Gramian (K, K) of K rows of parts; symmetric, on the scratch's device, in its dtype."""
        if self._fused is not None:
            return self._fused([[part.reshape(-1) for part in row] for row in rows])
        G = self._zero.clone()
        for step in self._steps:
            G += step.product(rows)
        return (G + G.T) / 2  # a product's two halves may be rounded each on its own


# The most rows for which the kernel was measured faster than the steps below, for each compute capability, by
# benchmarks/gramian.py on such a device. No device has been at hand, so that none is here and the kernel is not chosen.
_KERNEL_FASTER_UP_TO: dict[tuple[int, int], int] = {}


def _fused_kernel(num_rows: int, device: torch.device) -> Callable[[Sequence[Sequence[Tensor]]], Tensor] | None:
    """Return the kernel where it was measured faster and can be had, else None."""
    if device.type != "cuda" or num_rows > _KERNEL_FASTER_UP_TO.get(torch.cuda.get_device_capability(device), 0):
        return None
    try:
        from gradalign.kernels.gramian import gramian as fused  # noqa: PLC0415, imported only when chosen
    except ImportError:  # CUDA without Triton
        return None
    return fused


class _Step:
    """The pieces that fill the scratch once."""

    def __init__(self, pieces: Sequence[Piece], table: Tensor, shapes: Sequence[Sequence[int]]) -> None:
        end = sum(piece.numel for piece in pieces)
        self._wide = table[:, :end]
        self._tiles = table[:, : -(-end // _TILE) * _TILE].unflatten(1, (-1, _TILE)).transpose(0, 1)
        self._rest = table[:, end : self._tiles.shape[0] * _TILE]
        self._pieces = pieces
        self._into: list[Tensor] = []
        for row in table:
            places = row[:end].split([piece.numel for piece in pieces])
            self._into += [
                place.view(shapes[piece.part]) if piece.cut is None else place
                for place, piece in zip(places, pieces, strict=True)
            ]

    def product(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return this step's part of the Gramian."""
        torch._foreach_copy_(self._into, [piece.of(row) for row in rows for piece in self._pieces])
        wide = self._wide
        if wide.device.type != "cpu":
            return wide @ wide.T
        if len(wide) <= _MOST_ROWS_FOR_DOTS:
            dots = [[torch.dot(a, b) for b in wide[: i + 1]] for i, a in enumerate(wide)]
            return torch.stack([dots[max(i, j)][min(i, j)] for i in range(len(wide)) for j in range(len(wide))]).view(
                len(wide), -1
            )
        self._rest.zero_()
        return torch.bmm(self._tiles, self._tiles.transpose(1, 2)).sum(0)


def largest_whole(num_rows: int, device: torch.device) -> int:
    """Return how many elements of each of K rows fit into the scratch, a multiple of the tile."""
    return _scratch_size(num_rows, device) // num_rows // _TILE * _TILE


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a row, or a stretch of a flat part.

    Attributes:
        part: The part's number.
        cut: Which elements of it; None for all.
        numel: How many these are.
    """

    part: int
    cut: slice | None
    numel: int

    def of(self, row: Sequence[Tensor]) -> Tensor:
        """Return this piece of a row."""
        return row[self.part] if self.cut is None else row[self.part][self.cut]


def fill(shapes: Sequence[Sequence[int]], room: int) -> list[list[Piece]]:
    """Return pieces that make up whole rows, in lists of at most ``room`` elements; only larger parts are cut."""
    fillings: list[list[Piece]] = []
    free = 0
    for part, shape in enumerate(shapes):
        numel = torch.Size(shape).numel()
        if numel == 0:
            continue
        if numel > free:
            fillings.append([])
            free = room
        if numel <= room:
            fillings[-1].append(Piece(part, None, numel))
            free -= numel
            continue
        for start in range(0, numel, room):
            piece = Piece(part, slice(start, min(start + room, numel)), min(room, numel - start))
            if start:
                fillings.append([])
            fillings[-1].append(piece)
            free = room - piece.numel
    return fillings


def gramian(rows: Sequence[Tensor] | Tensor | Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the Gramian of the rows.

    Args:
        rows: K tensors (P,), or one (K, P), of one floating dtype and device; or K lists of parts, where the n-th
            part has the same shape, dtype and device in every row.

    Returns:
        (K, K), symmetric, float64 (float32 on devices that have no float64), on the rows' device.

    >>> gramian(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    tensor([[ 5.,  1.],
            [ 1., 10.]], dtype=torch.float64)
    """
    parts = [[row.reshape(-1)] if isinstance(row, Tensor) else [part.reshape(-1) for part in row] for row in rows]
    device = parts[0][0].device
    plan = GramianPlan([part.shape for part in parts[0]], len(parts), make_scratch(device, len(parts)))
    return plan(parts)
