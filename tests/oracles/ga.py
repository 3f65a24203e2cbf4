"""Gradient alignment on raw gradients: Zhu et al., GAML-BERT, EMNLP 2021, Eq. 5 to 7."""

from __future__ import annotations

import torch


def gradient_alignment(J, alpha, anchor, *, hard):
    """Eq. 5 to 7, with norms and angles as the paper writes them."""
    g_ce = J[anchor]
    norm_ce = g_ce.norm()
    projected, kept = torch.zeros_like(g_ce), 0
    for k, g_kd in enumerate(J):
        if k == anchor:
            continue
        if norm_ce == 0 or g_kd.norm() == 0:
            cos = torch.zeros((), dtype=J.dtype)
        else:
            cos = (g_kd / g_kd.norm()) @ (g_ce / norm_ce)
        if hard and cos < 0:  # theta > 90 degrees
            continue
        kept += 1
        if norm_ce > 0:
            projected = projected + g_kd.norm() * cos / norm_ce * g_ce
    if hard and kept == 0:
        return g_ce
    return (1 - alpha) * g_ce + alpha * projected
