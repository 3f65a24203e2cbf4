"""MGDA: Désidéri 2012, doi:10.1016/j.crma.2012.03.014: the vector of least norm in the convex hull of the gradients."""

from __future__ import annotations

import torch

from tests.oracles.dual_cone import nearest_point


def separating_vector(J):
    """The shortest x with <g_i, x> >= 1 for all i; None where the hull holds 0.

    d, the hull's point of least norm, has <g_i, d> >= norm(d)² for all i, and no point of the hull is nearer to 0 than
    the half-space {y : <x, y> >= 1} that holds it: so d = x / norm(x)².
    """
    if not bool((J.norm(dim=1) > 0).all()):
        return None
    size = J.norm(dim=1).min()
    x = nearest_point(J / size, torch.zeros_like(J[0]), torch.ones(len(J), dtype=J.dtype))
    return None if x is None else x / size


def aligned_gradient(J):
    """The vector of least norm in the convex hull of the rows of J."""
    x = separating_vector(J)
    # Divided twice: norm(x)² would overflow long before x does.
    return torch.zeros_like(J[0]) if x is None else x / x.norm() / x.norm()
