"""How far an aligned gradient may lie from an oracle's, and where a comparison proves something."""

from __future__ import annotations

import torch
from hypothesis import assume
from torch.testing import assert_close

from tests.oracles.linear import size_of_terms


def assert_agrees(J, w, expected, tolerance=1e-12):
    """J'w is the paper's gradient, relative to the size of the terms that J'w adds up: they can cancel."""
    size = size_of_terms(J, w).clamp(min=1e-300)
    assert_close(J.T @ w / size, expected / size, rtol=tolerance, atol=tolerance)


def assert_close_for(J, d, expected, tolerance=1e-12):
    """d is the paper's gradient, relative to the gradients' sizes.

    For weights on the simplex, which are sums of numbers of order one: where a weight is zero its rounding is not.
    """
    size = J.norm(dim=1).sum().clamp(min=1e-300)
    assert_close(d / size, expected / size, rtol=tolerance, atol=tolerance)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def steps_from(J, seed, count=6):
    """J and what might follow it in training: each row with noise of half its own norm, a zero row still zero."""
    noise = torch.randn(count - 1, *J.shape, dtype=J.dtype, generator=generator(seed))
    return [J, *(J + 0.5 * J.norm(dim=1, keepdim=True) / J.shape[1] ** 0.5 * noise)]


def perturbed(J, relative):
    """J with each row moved by this share of its norm."""
    # Of a seed that no draw has: noise along the draw's own would leave nearly parallel gradients on their line.
    noise = torch.randn(J.shape, dtype=J.dtype, generator=generator(2**40 + 1))
    return J + relative * J.norm(dim=1, keepdim=True) / J.shape[1] ** 0.5 * noise


def well_posed(paper, steps, *, amplification=1e3):
    """Whether the paper's own answers to all the steps move little when the gradients do.

    Where they jump (a constraint about to bind, the edge of feasibility, a chaotic iteration) two exact
    computations that round differently part, and a comparison proves nothing. `paper` makes a fresh oracle.
    """
    one, two = paper(), paper()
    for J in steps:
        here, there = one(J), two(perturbed(J, 1e-9))
        if (here - there).norm() > amplification * 1e-9 * here.norm():
            return False
    return True


def clear_rank(J):
    """The singular values over the rank; draws that leave one between rounding and 1e-4 of the largest are passed.

    Its square in G could not be told from rounding.
    """
    singular = torch.linalg.svdvals(J)
    kept = singular[singular > 1e-12 * singular.max()]
    assume(not (kept < 1e-4 * singular.max()).any())
    return kept
