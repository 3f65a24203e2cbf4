"""GEM on raw gradients: Lopez-Paz and Ranzato 2017, arXiv:1706.08840, Eq. 8 to 11, solved as a projection."""

from __future__ import annotations

import numpy as np
import torch
from qpsolvers import Problem, solve_problem

from tests.oracles.dual_cone import project


def project_on_polyhedron(x, C, b):
    """argmin 1/2 |z - x|^2 subject to C z >= b, or None where no z satisfies that: a QP whose Hessian is I."""
    lengths = np.linalg.norm(C, axis=1)
    rows = lengths > 0  # a zero row says 0 >= b, which every caller's zero row satisfies
    C, b = C[rows] / lengths[rows, None], b[rows] / lengths[rows]
    unit = max(np.abs(x).max(initial=0.0), np.abs(b).max(initial=0.0))
    if unit == 0 or not len(C):
        return x
    for slack in (0.0, 1e-12, 1e-10):  # the others let in what only rounding excludes, such as opposite half-spaces
        solution = solve_problem(Problem(np.eye(len(x)), -x / unit, -C, slack - b / unit), solver="quadprog")
        if solution.found:
            return solution.x * unit
    return None


def gem(J, margin, ridge, anchor):
    """g + M'v for v = argmin 1/2 v'(MM' + eI)v + (Mg)'v over v >= m: the dual of a projection.

    With v = m + u, u >= 0, and g' = g + M'm that is the dual of min 1/2 |z - g'|^2 + 1/2 |t - sqrt(e) m|^2 subject to
    M z + sqrt(e) t >= 0: the nearest point, in z and in slacks t, that conflicts with no memory.
    """
    g = J[anchor].numpy()
    M = np.array([h.numpy() for k, h in enumerate(J) if k != anchor]).reshape(-1, len(g))
    if not M.any():
        return J[anchor]
    root = np.sqrt(ridge * (M**2).sum(1).mean())
    start = torch.from_numpy(np.concatenate([g + margin * M.sum(0), np.full(len(M), root * margin)]))
    walls = torch.from_numpy(np.hstack([M, root * np.eye(len(M))]))
    units = walls / walls.norm(dim=1, keepdim=True).clamp(min=1e-300)
    within = units.T @ (torch.linalg.pinv(units.T) @ start)
    return (project(walls, within) + start - within)[: len(g)]  # what is across all walls is in no one's way
