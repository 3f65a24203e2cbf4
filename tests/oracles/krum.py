"""Krum and Multi-Krum on raw gradients: Blanchard et al., NeurIPS 2017, arXiv:1703.02757, Sec. 4."""

from __future__ import annotations


def krum_scores(J, num_byzantine=0):
    """s(i): the sum of |g_i - g_j|^2 over the n - f - 2 gradients g_j closest to g_i."""
    scores = []
    for i, g in enumerate(J):
        distances = sorted(float((g - h) @ (g - h)) for j, h in enumerate(J) if j != i)
        scores.append(sum(distances[: len(J) - num_byzantine - 2]))
    return scores


def krum(J, num_byzantine=0, num_selected=1):
    """The mean of the m gradients with the lowest scores."""
    scores = krum_scores(J, num_byzantine)
    chosen = sorted(range(len(J)), key=lambda i: (scores[i], i))[:num_selected]
    return sum(J[i] for i in chosen) / num_selected
