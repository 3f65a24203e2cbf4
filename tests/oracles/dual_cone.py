"""DualProj and UPGrad: Lopez-Paz and Ranzato 2017, arXiv:1706.08840, Section 3; Quinton and Rey 2024, arXiv:2406.16232.

Both project onto the dual cone {d : <g_i, d> >= 0 for all i}: GEM a single vector, UPGrad each gradient alone.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from qpsolvers import solve_qp
from scipy.optimize import nnls


def nearest_point(J, x, bounds):
    """argmin of norm(d - x) over the d with <g_i, d> >= bounds_i, all in the span of the g_i; None if there is none.

    The Hessian is the identity whatever the rank of J. The span's own coordinates keep the problem small, and rows of
    unit length (a half-space does not change when its normal does) keep it well scaled. A zero g_i bounds nothing: the
    caller sees to it that its bound is not positive.
    """
    norms = J.norm(dim=1)
    rows = norms > 0
    size = x.norm()
    if size == 0 and rows.any():
        size = (bounds[rows] / norms[rows]).abs().max()  # the bounds set the unit instead
    if size == 0 or not rows.any():
        return x.clone()
    basis = torch.linalg.qr(J[rows].T).Q
    units = ((J[rows] / norms[rows, None]) @ basis).numpy()
    start = (basis.T @ (x / size)).numpy()
    h = (bounds[rows] / norms[rows] / size).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # qpsolvers warns where the bounds contradict one another
        d = solve_qp(np.eye(len(start)), -start, G=-units, h=-h, solver="quadprog")
    return None if d is None else basis @ torch.from_numpy(d) * size


def project(J, x):
    """The point of the dual cone that is nearest to x: 0 is in the cone, so there is one.

    Many half-spaces that meet in a point can make quadprog give up. What x lacks is then sought in the cone that the
    g_i span, sum_i c_i g_i with c >= 0, as Moreau's decomposition of x has it.
    """
    d = nearest_point(J, x, torch.zeros(len(J), dtype=J.dtype))
    if d is None:
        units = J / J.norm(dim=1, keepdim=True).clamp(min=1e-300)
        c, _ = nnls(units.T.numpy(), -(x / x.norm()).numpy(), maxiter=100 * len(J))
        d = x + x.norm() * (torch.from_numpy(c) @ units)
    return d


def dual_proj(J, preference):
    """The mean of the gradients, projected."""
    return project(J, J.T @ preference)


def upgrad(J, preference):
    """Each gradient, projected; their mean."""
    total = torch.zeros_like(J[0])
    for share, g in zip(preference, J, strict=True):
        total = total + project(J, share * g)
    return total
