"""PCGrad's projection with the anchor fixed: Yu et al. 2020, arXiv:2001.06782, Algorithm 1, line 6, for auxiliaries."""

from __future__ import annotations

import torch


def anchored_pcgrad(J, alpha, anchor):
    """(1 - alpha) g_a + alpha times the auxiliaries, each rid of the part that points against the anchor."""
    g_a = J[anchor]
    kept = torch.zeros_like(g_a)
    for k, g in enumerate(J):
        if k == anchor:
            continue
        if g @ g_a < 0:
            unit = g_a / g_a.norm()
            kept = kept + (g - (g @ unit) * unit)
        else:
            kept = kept + g
    return (1 - alpha) * g_a + alpha * kept
