"""Aligned-MTL: Senushkin et al. 2023, arXiv:2305.19000, Equation 9 and Algorithm 1; median and mean: official code."""

from __future__ import annotations

import torch


def aligned_gradient(J, preference, scale="min", rtol=1e-8):
    """sqrt(s) V U' preference with J' = V S U': the gradients' nearest system with all singular values one, scaled."""
    left, singular, right = torch.linalg.svd(J.T, full_matrices=False)
    rank = int((singular > rtol * singular.max()).sum())  # 0 where J is 0
    if rank == 0:
        return torch.zeros_like(J[0])
    kept = singular[:rank]
    if scale == "min":
        factor = kept.min()
    elif scale == "median":
        factor = (kept**2).median().sqrt()
    else:
        factor = (kept**2).mean().sqrt()
    return factor * (left[:, :rank] @ (right[:rank] @ preference))
