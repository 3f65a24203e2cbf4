"""Gradient similarity as a gate: Du et al. 2018, arXiv:1812.02224, Sec. 3 and Algorithms 1 and 2."""

from __future__ import annotations

import math


def cosine(g, h):
    length = math.sqrt(float(g @ g)) * math.sqrt(float(h @ h))
    return float(g @ h) / length if length > 0 else 0.0


def gates(J, anchor, *, hard):
    """Weights of the gradients: 1 for the main loss, max(0, cos) or 1[cos >= 0] for each auxiliary."""
    weights = []
    for k, g in enumerate(J):
        cos = cosine(g, J[anchor])
        gate = float(cos >= 0) if hard else max(0.0, cos)
        weights.append(1.0 if k == anchor else gate)
    return weights


def cosine_gate(J, anchor, *, hard):
    return sum(weight * g for weight, g in zip(gates(J, anchor, hard=hard), J, strict=True))
