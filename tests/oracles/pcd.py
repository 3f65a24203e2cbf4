"""Priority-constrained descent on raw gradients: Not All Objectives Are Born Equal, TMLR 2026, arXiv:2606.29521."""

from __future__ import annotations

import numpy as np
import torch

from tests.oracles.gem import project_on_polyhedron


class Paper:
    """d~ = argmin 1/2 |d - g~_1|^2 subject to <g~_j, d> >= tau |g~_j|^2, rescaled to |g_1|.

    g~_i = g_i / sqrt(v_i), v_i the average of |g_i|^2 over the calls with decay beta, corrected for its bias.
    """

    def __init__(self, tau=0.02, beta=0.999, anchor=0):
        self.tau, self.beta, self.anchor = tau, beta, anchor
        self.average, self.calls = None, 0

    def __call__(self, J):
        J = J.numpy()
        squares = (J**2).sum(1)
        self.calls += 1
        old = np.zeros_like(squares) if self.average is None else self.average
        self.average = self.beta * old + (1 - self.beta) * squares
        lengths = np.sqrt(self.average / (1 - self.beta**self.calls))
        normalised = np.where(lengths[:, None] > 0, J / np.where(lengths > 0, lengths, 1.0)[:, None], 0.0)
        g = J[self.anchor]
        others = np.delete(normalised, self.anchor, axis=0)
        d = project_on_polyhedron(normalised[self.anchor], others, self.tau * (others**2).sum(1))
        if d is None:
            return torch.from_numpy(g)
        length = np.linalg.norm(d)
        nothing = length <= 1e-13 * np.linalg.norm(normalised[self.anchor])  # what is left of it is rounding
        return torch.from_numpy(np.zeros_like(g) if nothing else d / length * np.linalg.norm(g))
