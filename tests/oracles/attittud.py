"""ATTITTUD on raw gradients: Dery et al., ICLR 2021, arXiv:2108.11346, Sec. 3 and Algorithm 1."""

from __future__ import annotations

import torch

RANK = 1e-6  # singular values below this share of the largest span nothing that a Gramian could tell from rounding


def directions(J, anchor, basis, rank):
    """The right singular vectors v_j of the basis gradients, the largest `rank` of them."""
    B = J[list(basis) or [anchor]]
    if not B.any():
        return torch.zeros(0, J.shape[1], dtype=J.dtype)
    _, values, V = torch.linalg.svd(B, full_matrices=False)
    return V[values > RANK * values[0]][:rank]


def attittud(J, anchor, basis=(), rank=None, *, good=1.0, bad=0.0, neutral=1.0):
    """g_a plus each auxiliary's parts inside the subspace, by the sign of the anchor's, and outside of it."""
    V = directions(J, anchor, basis, rank)
    d = J[anchor].clone()
    for k, g in enumerate(J):
        if k == anchor or k in basis:
            continue
        rest = g.clone()
        for v in V:
            part = (g @ v) * v
            rest = rest - part
            d = d + (good if (g @ v) * (J[anchor] @ v) >= 0 else bad) * part
        d = d + neutral * rest
    return d
