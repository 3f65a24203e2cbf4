"""Fixed weights on vectors: the sum, the mean and a weighted sum, and the size of what such a sum adds up."""

from __future__ import annotations

import torch


def weighted_sum(J, weights):
    d = torch.zeros_like(J[0])
    for g, weight in zip(J, weights, strict=True):
        d = d + weight * g
    return d


def gradient_sum(J):
    return weighted_sum(J, [1.0] * len(J))


def gradient_mean(J):
    return gradient_sum(J) / len(J)


def size_of_terms(J, w):
    """sum_i |w_i| norm(g_i): what the rounding error of J'w is relative to, for the terms can cancel."""
    return (w.abs() * J.norm(dim=1)).sum()
