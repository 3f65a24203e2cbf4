"""CAGrad: Liu et al. 2021, arXiv:2110.14048, Equation 3, and the official code's division by 1 + c²."""

from __future__ import annotations

from tests.oracles.dual_cone import nearest_point


def worst(J, d):
    """min_i <g_i, d>: the improvement of the group that improves least."""
    return (J @ d).min()


def aligned_gradient(J, c, preference, *, rescale=False):
    """argmax of min_i <g_i, d> over norm(d - g_0) <= c norm(g_0), with g_0 = J' preference.

    The larger the t asked of all <g_i, d> >= t, the farther the nearest such d lies from g_0: halve the interval of t
    until the distance is the ball's radius. Where every point with t = 0 is as good as any (0 is in the hull of the
    gradients and the ball meets the dual cone), the maximum is not unique: this is the one nearest to g_0.
    """
    g_0 = J.T @ preference
    radius = c * g_0.norm()
    low, best = worst(J, g_0), g_0
    high = (J.norm(dim=1) * (1 + c) * g_0.norm()).min()
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        d = nearest_point(J, g_0, middle.expand(len(J)))
        if d is None or (d - g_0).norm() > radius:
            high = middle
        else:
            low, best = middle, d
    return best / (1 + c**2) if rescale else best
