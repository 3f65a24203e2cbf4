"""GradDrop on raw gradients: Chen et al. 2020, arXiv:2010.06808, Algorithm 1, lines 10 to 15, f the identity."""

from __future__ import annotations

import torch


def graddrop(J, uniforms, leak):
    """Keep, at each coordinate, the entries of one sign: the positive with the probability of their purity."""
    leaks = [float(leak)] * len(J) if isinstance(leak, int | float) else leak
    d = torch.zeros_like(J[0])
    for p in range(J.shape[1]):
        column = J[:, p].tolist()
        total = sum(abs(entry) for entry in column)
        if total == 0:
            continue
        purity = (1 + sum(column) / total) / 2
        for entry, share in zip(column, leaks, strict=True):
            kept = (entry > 0 and purity > uniforms[p]) or (entry < 0 and purity < uniforms[p])
            d[p] += entry if kept else share * entry
    return d
