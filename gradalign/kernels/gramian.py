"""The Gramian of K gradients that lie scattered in memory, in one launch over all parts of a dtype.

A row is a gradient in N *parts*, one contiguous tensor for each parameter. Parts are cut into *pieces*, the pieces are
dealt out to a bounded number of *programs*, and a program walks over a piece in *blocks*. Each program keeps its own
Gramian; the sum over programs is the answer, the same bits each time.

Products and sums are float64. A product of two float32 numbers is exact there and cannot underflow, at any scale of
the gradients, and should hide behind the memory: by its data sheet an H100 reads 0.8e12 float32 numbers a second, K of
which make K (K + 1) / 2 products, and does 17e12 float64 multiply-adds a second, 33e12 on its tensor cores.

Shapes: K rows of N parts -> (K, K).
"""

# ruff: noqa: RUF005 - triton's language adds tuples, and has no (*unpacking, of_them)
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# Up to here a thread holds all K (K + 1) / 2 sums in its registers, 36 of two registers each, and multiplies element by
# element. More rows go through matrix products, padded to 16 or 32: a tensor core then holds the sums.
_MOST_BY_ELEMENT = 8
# Elements of all rows together that a thread reads at once: as float32, 8 loads of 16 bytes, or some 48 to 64 KiB a
# multiprocessor under way with the warps below. More takes so many registers that fewer warps find room.
_ELEMENTS_PER_THREAD = 32
_VECTOR_BYTES = 16  # the widest load, which asks for addresses that are multiples of it
_WARPS_BY_ELEMENT = 4
# Elements of all padded rows together in a block of a matrix product: 4 KiB of shared memory as float32, three of which
# are on their way or in use. One warp: every further one would widen the same elements to float64 again, and the rate
# of that conversion, not of the products, comes next after the memory's.
_ELEMENTS_PER_PRODUCT = 1024
_WARPS_BY_PRODUCT = 1
_STAGES = 3
_WARPS_PER_MULTIPROCESSOR = 16  # what there is room for where a thread has 128 registers; with the most, 168, 12 run
_INTERPRETED_PROGRAMS = 3  # on a CPU, through triton's interpreter, where programs run one after the other
# Pieces a program, so that parts of unlike lengths even out; and so long that a program's K x K sums stay small beside
# the K pieces it reads.
_PIECES_PER_PROGRAM = 4
_SHORTEST_PIECE = 1024

# Tables that CUDA graphs copy from. A graph reads the host's memory anew at each replay, so that it must neither change
# nor go to another use; and how long a graph lives cannot be seen from here. A few KiB for each captured call.
_captured: list[Tensor] = []


def gramian(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the Gramian of rows in parts.

    Each element is read once, and nothing waits for the device. The first call for a K and a dtype compiles, so that
    one has to come before the capture of a CUDA graph; the graph then reads where the parts lay at its capture.

    Args:
        rows: K rows, 1 to 32, of N >= 1 parts each; part n is contiguous, and has one number of elements, one dtype
            (float16, bfloat16, float32 or float64) and one device in all rows. Parts may be empty, differ in dtype and
            begin at any element.

    Returns:
        (K, K), symmetric, float64, on the rows' device.

    Raises:
        ValueError: The rows do not match, or a part is not contiguous.
        TypeError: A part has another dtype.
    """
    _check(rows)
    first = rows[0]
    kinds: dict[torch.dtype, list[int]] = {}
    for n, part in enumerate(first):
        if part.numel():
            kinds.setdefault(part.dtype, []).append(n)
    launches = [
        _Launch.of(len(rows), dtype, tuple(first[n].numel() for n in parts), first[0].device)
        for dtype, parts in kinds.items()
    ]
    programs = [launch.programs for launch in launches]
    partials = torch.empty(sum(programs), len(rows), len(rows), dtype=torch.float64, device=first[0].device)
    with torch.cuda.device_of(partials):  # triton launches on the current device
        for launch, parts, sums in zip(launches, kinds.values(), partials.split(programs), strict=True):
            launch.run([[row[n] for n in parts] for row in rows], sums)
    lower = partials.sum(0).tril()
    return lower + lower.tril(-1).T  # a sum over programs, or a matrix product, may round (i, j) and (j, i) unlike


def _check(rows: Sequence[Sequence[Tensor]]) -> None:
    """Raise unless the kernel may read what the rows' addresses point to."""
    first = rows[0]
    kinds = [(part.numel(), part.dtype, part.device) for part in first]
    for k, row in enumerate(rows):
        if [(part.numel(), part.dtype, part.device) for part in row] != kinds:
            raise ValueError(f"`rows` must have parts of the same sizes, dtypes and devices, got others in row {k}.")
        if not all(part.is_contiguous() for part in row):
            raise ValueError(f"`rows` must have contiguous parts, got another in row {k}; pass part.contiguous().")
    for part in first:
        if part.dtype not in _TYPES:
            raise TypeError(f"`rows` must be float16, bfloat16, float32 or float64, got {part.dtype}.")


class _Launch(NamedTuple):
    """What a launch over the parts of one dtype depends on, beside their addresses.

    Attributes:
        begins: For each part, how many pieces lie before it.
        vectors: Loads of a thread from each row in a block; unused by matrix products.
        lanes: Elements that lie beside one another in a block: threads, or columns of a matrix product.
        vector: Elements of a load.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    begins: tuple[int, ...]
    pieces: int
    piece_numel: int
    programs: int
    vectors: int
    lanes: int
    vector: int

    @staticmethod
    @lru_cache(maxsize=64)
    def of(num_rows: int, dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> _Launch:
        """Return the launch for K rows of parts of these sizes, none of them empty."""
        padded = triton.next_power_of_2(num_rows)
        if num_rows > _MOST_BY_ELEMENT:
            warps = _WARPS_BY_PRODUCT
            vectors, lanes, vector = 1, _ELEMENTS_PER_PRODUCT // padded, 1
        else:
            warps = _WARPS_BY_ELEMENT
            elements = _ELEMENTS_PER_THREAD // max(padded, 2)
            vector = min(elements, _VECTOR_BYTES // dtype.itemsize)
            vectors, lanes = elements // vector, 32 * warps
        block = vectors * lanes * vector
        most = _INTERPRETED_PROGRAMS
        if device.type == "cuda":
            most = torch.cuda.get_device_properties(device).multi_processor_count * _WARPS_PER_MULTIPROCESSOR // warps
        length = max(_SHORTEST_PIECE, triton.cdiv(sum(sizes), most * _PIECES_PER_PROGRAM))
        piece_numel = triton.cdiv(length, block) * block  # a piece then begins as well aligned as its part
        begins, pieces = [], 0
        for size in sizes:
            begins.append(pieces)
            pieces += triton.cdiv(size, piece_numel)
        programs = min(most, pieces)
        return _Launch(dtype, sizes, tuple(begins), pieces, piece_numel, programs, vectors, lanes, vector)

    def run(self, rows: Sequence[Sequence[Tensor]], sums: Tensor) -> None:
        """Write each program's Gramian of the rows into sums, (programs, K, K)."""
        num_rows, num_parts = len(rows), len(self.sizes)
        reach = (1 << (num_parts - 1).bit_length()) // 2  # the first stride of a search among the parts
        numbers = [num_parts, reach, self.pieces, self.piece_numel]
        addresses = [part.data_ptr() for row in rows for part in row]
        table = _to_device([*numbers, *addresses, *self.begins, *self.sizes], sums.device)
        # Fusing a product into a sum is free here, where products are exact; triton's default for it changes.
        if num_rows > _MOST_BY_ELEMENT:
            _by_product[(self.programs,)](
                table,
                sums,
                kind=_TYPES[self.dtype],
                K=num_rows,
                padded=triton.next_power_of_2(num_rows),
                columns=self.lanes,
                num_warps=_WARPS_BY_PRODUCT,
                num_stages=_STAGES,
                enable_fp_fusion=True,
            )
        else:
            _by_element[(self.programs,)](
                table,
                sums,
                kind=_TYPES[self.dtype],
                K=num_rows,
                vectors=self.vectors,
                lanes=self.lanes,
                vector=self.vector,
                num_warps=_WARPS_BY_ELEMENT,
                enable_fp_fusion=True,
            )


def _to_device(table: Sequence[int], device: torch.device) -> Tensor:
    """Return the table on the device, int64, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(table, dtype=torch.int64, device=device)
    # Pinned memory, which torch gives to nobody else before the copy has been made.
    host = torch.tensor(table, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)


# The kernels' table, int64: the number of parts N, the search's first stride, the number of pieces, the elements of a
# piece; K x N addresses; N times the pieces before a part; N times the elements of a part. What is known of each row or
# pair of rows stands in a tuple, over which loops are unrolled. It is triton's language, which mypy does not follow.


@triton.jit
@no_type_check
def _locate(table: tl.tensor, piece: tl.tensor, K: tl.constexpr) -> tl.tuple:
    """Return where the addresses of a piece's part stand, where in it the piece begins, and its number of elements."""
    num_parts = tl.load(table)
    stride = tl.load(table + 1)
    begins = table + 4 + K * num_parts
    part = num_parts * 0  # the last part that begins at the piece or before it, by bisection
    while stride > 0:
        later = part + stride
        begin = tl.load(begins + later, mask=later < num_parts, other=piece + 1)
        part = tl.where(begin <= piece, later, part)
        stride = stride // 2
    piece_numel = tl.load(table + 3)
    start = (piece - tl.load(begins + part)) * piece_numel
    return table + 4 + part, start, tl.minimum(tl.load(begins + num_parts + part) - start, piece_numel)


@triton.jit
@no_type_check
def _add_products(sums: tl.tuple, rows: tl.tuple, K: tl.constexpr) -> tl.tuple:
    """Add each pair's products to its sums, (lanes,); all but the lanes' axis of a row is summed within a thread."""
    wide = ()
    for k in tl.static_range(K):
        wide = wide + (rows[k].to(tl.float64),)
    added = ()
    for i in tl.static_range(K):
        for j in tl.static_range(i + 1):
            products = wide[i] * wide[j]
            if len(products.shape) == 3:
                products = tl.sum(products, axis=2)
            added = added + (sums[i * (i + 1) // 2 + j] + tl.sum(products, axis=0),)
    return added


@triton.jit
@no_type_check
def _store_sums(partial: tl.tensor, sums: tl.tuple, K: tl.constexpr) -> None:
    """Write each pair's sums, (lanes,), as one entry of a program's Gramian, (K, K)."""
    for i in tl.static_range(K):
        for j in tl.static_range(i + 1):
            total = tl.sum(sums[i * (i + 1) // 2 + j], axis=0)
            tl.store(partial + i * K + j, total)
            tl.store(partial + j * K + i, total)


@triton.jit
@no_type_check
def _by_element(
    table: tl.tensor,
    partials: tl.tensor,
    kind: tl.constexpr,
    K: tl.constexpr,
    vectors: tl.constexpr,
    lanes: tl.constexpr,
    vector: tl.constexpr,
) -> None:
    """Write each program's Gramian into partials, (programs, K, K), from products element by element."""
    block: tl.constexpr = vectors * lanes * vector
    # A thread is a lane. Where a block is whole and aligned it reads vectors; elsewhere single elements, those of
    # neighbouring threads side by side.
    lane = tl.arange(0, lanes)
    whole = (tl.arange(0, vectors)[:, None, None] * lanes + lane[None, :, None]) * vector
    whole = whole + tl.arange(0, vector)[None, None, :]
    single = tl.arange(0, vectors * vector)[:, None] * lanes + lane[None, :]
    sums = ()
    for _ in tl.static_range(K * (K + 1) // 2):
        sums = sums + (tl.zeros([lanes], tl.float64),)
    for piece in range(tl.program_id(0), tl.load(table + 2), tl.num_programs(0)):
        addresses, start, length = _locate(table, piece, K)
        starts = ()
        misaligned = start * 0
        for k in tl.static_range(K):
            address = tl.load(addresses + k * tl.load(table))
            misaligned = misaligned | (address % 16)
            starts = starts + (address.to(tl.pointer_type(kind)) + start,)
        end_of_whole = tl.where(misaligned == 0, length // block * block, 0)
        for offset in range(0, end_of_whole, block):
            rows = ()
            for k in tl.static_range(K):
                # The promise is made about a pointer of this loop alone: the next loop's are not aligned.
                rows = rows + (tl.load(tl.multiple_of(starts[k] + offset, 16) + whole),)
            sums = _add_products(sums, rows, K)
        for offset in range(end_of_whole, length, block):
            index = offset + single
            rows = ()
            for k in tl.static_range(K):
                rows = rows + (tl.load(starts[k] + index, mask=index < length, other=0.0),)
            sums = _add_products(sums, rows, K)
    _store_sums(partials + tl.program_id(0) * K * K, sums, K)


@triton.jit
@no_type_check
def _by_product(
    table: tl.tensor,
    partials: tl.tensor,
    kind: tl.constexpr,
    K: tl.constexpr,
    padded: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """Write each program's Gramian into partials, (programs, K, K), from matrix products of padded blocks."""
    k = tl.arange(0, padded)
    column = tl.arange(0, columns)
    sums = tl.zeros([padded, padded], tl.float64)
    for piece in range(tl.program_id(0), tl.load(table + 2), tl.num_programs(0)):
        addresses, start, length = _locate(table, piece, K)
        address = tl.load(addresses + k * tl.load(table), mask=k < K, other=0)
        starts = address.to(tl.pointer_type(kind)) + start
        misaligned = tl.max(address % 16, axis=0)
        end_of_whole = tl.where(misaligned == 0, length // columns * columns, 0)
        for offset in range(0, end_of_whole, columns):
            aligned = tl.multiple_of(starts + offset, 16)  # a pointer of this loop alone, as above
            block = tl.load(aligned[:, None] + column[None, :], mask=k[:, None] < K, other=0.0).to(tl.float64)
            sums = tl.dot(block, tl.trans(block), sums, input_precision="ieee", out_dtype=tl.float64)
        for offset in range(end_of_whole, length, columns):
            index = offset + column
            inside = (k[:, None] < K) & (index[None, :] < length)
            block = tl.load(starts[:, None] + index[None, :], mask=inside, other=0.0).to(tl.float64)
            sums = tl.dot(block, tl.trans(block), sums, input_precision="ieee", out_dtype=tl.float64)
    entry = k[:, None] * K + k[None, :]
    # What stands beside K x K comes of padding, and is no number where a row holds an infinity.
    tl.store(partials + tl.program_id(0) * K * K + entry, sums, mask=(k[:, None] < K) & (k[None, :] < K))
