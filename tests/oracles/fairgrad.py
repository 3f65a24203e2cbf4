"""FairGrad: Ban and Ji 2024, arXiv:2402.15638, Equation 4: the update of largest alpha-fair utility.

Its maximum over a ball is, up to the ball's radius, the maximum of the utility less norm(d)² / 2. There d is the
utility's gradient, sum_i <g_i, d>^(-alpha) g_i: the paper's sum_i w_i g_i with <g_i, d> = w_i^(-1/alpha).
"""

from __future__ import annotations

import torch

from tests.oracles.mgda import separating_vector


def newton_ascent(J, d, slope, curvature):
    """argmax of sum_i f(<g_i, d>) - norm(d)² / 2 for concave f with f' = slope, f'' = curvature, infinite slope at 0.

    Newton's method from a d with all <g_i, d> > 0. The step's length is found by halving an interval in which the
    derivative along the step changes sign. None where it does not arrive: rates that differ by 20 orders of magnitude
    are more than the digits of d hold.
    """
    for _ in range(300):
        products = J @ d
        gradient = J.T @ slope(products) - d
        hessian = torch.eye(len(d), dtype=d.dtype) - J.T @ (curvature(products)[:, None] * J)
        step = torch.linalg.solve(hessian, gradient)

        def derivative(length, d=d, step=step):
            products = J @ (d + length * step)
            return step @ (J.T @ slope(products) - d - length * step) if bool((products > 0).all()) else -torch.inf

        low, high = 0.0, 1.0
        if derivative(high) < 0:
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if derivative(middle) >= 0 else (low, middle)
        else:
            low = high
        d = d + low * step
        if step.norm() <= 1e-15 * d.norm():
            break
    products = J @ d
    arrived = bool((products > 0).all()) and bool((J.T @ slope(products) - d).norm() <= 1e-8 * d.norm())
    return d if arrived else None


def aligned_gradient(J, alpha):
    """argmax of sum_i <g_i, d>^(1-alpha) / (1-alpha) - norm(d)² / 2; None where no d has all <g_i, d> > 0."""
    size = J.norm(dim=1).max()
    x = None if size == 0 else separating_vector(J / size)
    if x is None:
        return None
    basis = torch.linalg.qr(J.T).Q  # the maximum lies in the span of the gradients
    coordinates = J @ basis / size
    d = newton_ascent(
        coordinates,
        basis.T @ x,
        lambda products: products**-alpha,
        lambda products: -alpha * products ** (-alpha - 1),
    )
    # With J = s J1, d = s^k d1 makes both terms s^(2k) times what they are for J1.
    return None if d is None else basis @ d * size ** ((1 - alpha) / (1 + alpha))
