"""MoDo on raw gradients of independent batches: Chen et al. 2023, arXiv:2305.20057, Algorithm 2 and Eq. 2.9."""

from __future__ import annotations

import torch


def project_on_simplex(v):
    """argmin |x - v| over x >= 0 with sum 1: v - tau where positive, for the support size that fits its own tau."""
    descending = sorted(v.tolist(), reverse=True)
    for size in range(len(descending), 0, -1):
        tau = (sum(descending[:size]) - 1) / size
        if descending[size - 1] > tau:  # the smallest member of the support stays positive: the largest such support
            return torch.tensor([max(entry - tau, 0.0) for entry in v.tolist()], dtype=v.dtype)
    raise AssertionError("the largest entry alone always fits")


def split_batches(J, batches):
    """Rows a1, b1, a2, b2, ... as one matrix (K, P) a batch."""
    size = len(J) // batches
    return [J[size * b : size * (b + 1)] for b in range(batches)]


def stepped_batch(parts):
    """The gradients that the parameters step along: the only batch, the mean of two, the third of three."""
    if len(parts) == 3:
        return parts[2]
    return sum(parts) / len(parts)


def products(J_1, J_2):
    """A_ij = <g_i of the first batch, g_j of the second>, one product at a time."""
    A = torch.zeros(len(J_1), len(J_2), dtype=J_1.dtype)
    for i, g in enumerate(J_1):
        for j, h in enumerate(J_2):
            A[i, j] = g @ h
    return A


class MoDo:
    """lambda <- Proj(lambda - gamma (F1' F2 + rho I) lambda), then the step along F3 lambda with the new lambda."""

    def __init__(self, gamma, rho=0.0, *, batches=1, relative=True):
        self.gamma, self.rho, self.batches, self.relative = gamma, rho, batches, relative
        self.weights = None

    def __call__(self, J):
        parts = split_batches(J, self.batches)
        J_1, J_2 = parts[0], parts[min(1, self.batches - 1)]
        K = len(J_1)
        if self.weights is None:
            self.weights = torch.full((K,), 1 / K, dtype=J.dtype)
        unit = 1.0
        if self.relative:
            unit = sum(abs(float(g @ h)) for g, h in zip(J_1, J_2, strict=True)) / K
        direction = torch.zeros_like(J[0])
        for weight, h in zip(self.weights, J_2, strict=True):
            direction = direction + weight * h
        slope = torch.stack([g @ direction for g in J_1])
        slope = (slope / unit if unit > 0 else torch.zeros_like(slope)) + self.rho * self.weights
        self.weights = project_on_simplex(self.weights - self.gamma * slope)
        return self.weights @ stepped_batch(parts)
