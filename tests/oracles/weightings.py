"""Random weighting (Lin et al. 2022, arXiv:2111.10603, Algorithm 2) and CR-MOGM (Zhou et al. 2022, Algorithm 1)."""

from __future__ import annotations

import math

from tests.oracles.linear import weighted_sum


def random_weighting(J, normals):
    """sum_i softmax(lambda)_i g_i for draws lambda of the standard normal distribution."""
    exponentials = [math.exp(draw) for draw in normals]
    return weighted_sum(J, [e / sum(exponentials) for e in exponentials])


def momentum_weighting(steps, solve, momentum):
    """lambda_k = alpha lambda_(k-1) + (1 - alpha) lambda^_k, lambda_0 = lambda^_1, lambda^_k = solve(J_k)."""
    directions, weights = [], None
    for J in steps:
        solved = solve(J)
        weights = solved if weights is None else momentum * weights + (1 - momentum) * solved
        directions.append(weighted_sum(J, weights))
    return directions
