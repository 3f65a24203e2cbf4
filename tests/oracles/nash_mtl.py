"""Nash-MTL: Navon et al. 2022, arXiv:2202.01017, Section 3.1: the bargaining solution, argmax sum_i log <g_i, d>.

Its maximum over a ball is, up to the ball's radius, the maximum of sum_i log <g_i, d> - norm(d)² / 2. There
d = sum_i g_i / <g_i, d>: the paper's sum_i a_i g_i with G a = 1/a (Claim 3.1).
"""

from __future__ import annotations

import torch

from tests.oracles.fairgrad import newton_ascent
from tests.oracles.mgda import separating_vector


def aligned_gradient(J, max_norm=None):
    """The bargaining solution; None where no d has all <g_i, d> > 0."""
    norms = J.norm(dim=1, keepdim=True)
    # log <g_i, d> differs from log <g_i / norm(g_i), d> by a constant.
    units = J / norms
    x = None if bool((norms == 0).any()) else separating_vector(units)
    if x is None:
        return None
    basis = torch.linalg.qr(units.T).Q
    d = newton_ascent(units @ basis, basis.T @ x, lambda products: 1 / products, lambda products: -(products**-2))
    if d is None:
        return None
    d = basis @ d
    return d if max_norm is None else d * min(1.0, max_norm / d.norm().item())


def aligned_gradients(steps, update_every):
    """Algorithm 1 with the weights a solved at every n-th step: between them the last a, on the step's own gradients.

    The gradients of the solved steps have to be independent: a is then the only one with sum_i a_i g_i = d.
    """
    result = []
    for number, J in enumerate(steps):
        if number % update_every == 0:
            a = torch.linalg.lstsq(J.T, aligned_gradient(J)[:, None]).solution[:, 0]
        result.append(sum(share * g for share, g in zip(a, J, strict=True)))
    return result
