"""How exact the Gramian is and what it costs: gradalign's, and one float32 product over whole rows.

    python benchmarks/gramian.py

Errors are relative to the norms, max_ij |G_ij - exact| / (|g_i| |g_j|), against a float64 product by short pieces.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gradalign.gramian import gramian

_PIECE = 1000


def exact(J: Tensor) -> Tensor:
    """Return J J^T in float64, summed over short pieces first."""
    return torch.stack([(piece := part.double()) @ piece.T for part in J.split(_PIECE, dim=1)]).sum(0)


def seconds(call: Callable[[], Tensor], rounds: int = 7) -> float:
    """Return the median time of a call."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print a line for each K and P."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms and relative error")
    print(f"{'K':>3} {'P':>10} {'J @ J.T':>20} {'gradalign':>20}")
    for K, P in ((2, 850_000), (2, 22_600_000), (6, 22_600_000), (12, 22_600_000)):
        J = torch.randn(K, P, generator=torch.Generator().manual_seed(0))
        reference = exact(J)
        norms = reference.diagonal().sqrt()
        cells = []
        for call in (lambda J=J: J @ J.T, lambda J=J: gramian(J)):
            error = ((call().double() - reference).abs() / norms / norms[:, None]).max()
            cells.append(f"{1e3 * seconds(call):9.1f} {float(error):10.1e}")
        print(f"{K:3} {P:10} " + " ".join(cells))


if __name__ == "__main__":
    main()
