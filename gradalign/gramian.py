"""The Gramian of K gradients, G_ij = <g_i, g_j>, in one pass over them.

Shapes: K rows of P elements each -> (K, K).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements of a row that are taken at once. K pieces of 32768 in float64 stay in a core's cache; an accelerator wants
# few large pieces, of which K hold 8 MiB each.
_CPU_CHUNK = 2**15
_ACCELERATOR_CHUNK = 2**20


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that a Gramian has on this device: float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def gramian(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the Gramian of the rows.

    Each chunk of the rows is widened before it is multiplied. A product of two float32 numbers is exact in float64,
    so that what is lost is the rounding of a float64 sum; nor do the switches that lower the precision of float32
    products (``torch.set_float32_matmul_precision``) reach it. One float32 product over whole rows, J @ J.T, is
    faster for large K, but over millions of elements its sums drift, see ``benchmarks/gramian.py``.

    Args:
        rows: K tensors (P,), or one (K, P), of one floating dtype and device.

    Returns:
        (K, K), symmetric, float64 (float32 on devices that have no float64), on the rows' device.

    >>> gramian(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    tensor([[ 5.,  1.],
            [ 1., 10.]], dtype=torch.float64)
    """
    first = rows[0]
    dtype = accumulation_dtype(first.device)
    G = torch.zeros(len(rows), len(rows), dtype=dtype, device=first.device)
    most = _CPU_CHUNK if first.device.type == "cpu" else _ACCELERATOR_CHUNK
    wide = torch.empty(len(rows), min(most, first.numel()), dtype=dtype, device=first.device)
    for start in range(0, first.numel(), most):
        chunk = wide[:, : min(most, first.numel() - start)]
        for k, row in enumerate(rows):
            chunk[k].copy_(row[start : start + most])
        G.addmm_(chunk, chunk.T)
    return (G + G.T) / 2  # a product's two halves are rounded each on its own
