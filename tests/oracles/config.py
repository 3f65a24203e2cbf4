"""ConFIG: Liu et al. 2024, arXiv:2408.11104, Equations 2 and 3."""

from __future__ import annotations

import torch


def aligned_gradient(J, preference=None, rtol=1e-8):
    """(sum_i <g_i, x>) x, with x the unit vector along pinv(unit gradients) times their shares, ones by default.

    The pseudo-inverse acts on vectors; singular values below ``rtol`` times the largest count as 0, as do zero rows.
    """
    K = len(J)
    norms = J.norm(dim=1, keepdim=True)
    units = J / norms.where(norms > 0, 1.0)
    shares = torch.ones(K, dtype=J.dtype) if preference is None else K * preference
    x = torch.linalg.pinv(units, rtol=rtol) @ shares
    if x.norm() <= 1e-12 * shares.norm():  # opposites: what is left is rounding, and no direction
        return torch.zeros_like(x)
    x = x / x.norm()
    return sum(g @ x for g in J) * x
