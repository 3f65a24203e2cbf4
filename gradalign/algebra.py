"""What rules and solvers compute of a Gramian: lengths, cosines, eigenvalues, and quotients that survive a zero.

Shapes: G is (..., K, K), symmetric positive semi-definite up to rounding; vectors are (..., K).
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(G: Tensor) -> Tensor:
    """Return G in float64 (float32 on devices that have no float64)."""
    return G.to(torch.float32 if G.device.type == "mps" else torch.float64)


def rounding(G: Tensor) -> float:
    """Return what share of the largest eigenvalue of G (..., K, K), in G's dtype, can be rounding of its elements."""
    return 16 * G.shape[-1] * torch.finfo(G.dtype).eps


def times(M: Tensor, x: Tensor) -> Tensor:
    """Return the products Mx, (..., K)."""
    return (M @ x.unsqueeze(-1)).squeeze(-1)


def quadratic(M: Tensor, x: Tensor) -> Tensor:
    """Return x'Mx, (..., 1), 0 where rounding makes it negative."""
    return (x * times(M, x)).sum(-1, keepdim=True).clamp(min=0)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, 0 where b is not positive: a zero gradient has no direction to be divided by."""
    return torch.where(b > 0, a / b, 0.0)


def lengths(G: Tensor) -> Tensor:
    """Return the rows' norms, (..., K); rounding can leave a square a little below zero."""
    return G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def in_units(A: Tensor) -> Tensor:
    """Return A (..., K, K) divided by the mean of its diagonal's magnitudes, as it is where that is zero."""
    unit = A.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    return A / unit.where(unit > 0, 1.0)[..., None, None]


def cosines(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosines between the rows, (..., K, K), the rows' norms and their inverses, (..., K).

    A zero row is orthogonal to all others, and has the inverse 0.
    """
    norms = lengths(G)
    inverse = quotient(torch.ones_like(norms), norms)
    C = (G * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).clamp_(-1.0, 1.0)
    C.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return C, norms, inverse


def eigenvalues(G: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and the eigenvectors by columns; of zeros where a program is not finite.

    Waits for the device on CUDA.
    """
    finite = G.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    L, V = torch.linalg.eigh(G.where(finite, 0.0))  # NaN would end the whole batch in an error
    return L, V


def solve_consistently(C: Tensor, t: Tensor, least: float) -> Tensor:
    """Return pinv(C) t, (..., K), for a symmetric positive semi-definite C of unit diagonal, in its dtype.

    Eigenvalues, and components of t along the eigenvectors, below ``least`` of the largest count as zero. Waits for the
    device on CUDA, for the eigenvalues.
    """
    L, V = eigenvalues(C)
    along = times(V.mT, t)
    kept = (least * L[..., -1:] < L) & (along.abs() > least * t.abs().amax(-1, keepdim=True))
    return times(V, torch.where(kept, along / L, 0.0))
