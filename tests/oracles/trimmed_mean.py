"""The coordinate-wise trimmed mean on raw gradients: Yin et al. 2018, arXiv:1803.01498, Definition 2."""

from __future__ import annotations

import torch


def trimmed_mean(J, trim):
    d = torch.zeros_like(J[0])
    for p in range(J.shape[1]):
        kept = sorted(J[:, p].tolist())[trim : len(J) - trim]
        d[p] = sum(kept) / len(kept)
    return d
