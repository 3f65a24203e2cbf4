"""SDMGrad on raw gradients of independent batches: Xiao et al. 2023, arXiv:2305.18409, Algorithm 1 and Sec. 6.1."""

from __future__ import annotations

import torch

from tests.oracles.modo import project_on_simplex, split_batches, stepped_batch


class SDMGrad:
    """S projected steps, with the momentum of the official code, on 1/2 |J1'w + lambda g_0|^2 over the simplex.

    The gradient of the objective is taken from two batches, <g_i, J2'w + lambda g_0>, and both are measured in the
    mean norm of the gradients. d = (J3'w + lambda g_0) / (1 + lambda), the official code's normalisation.
    """

    def __init__(self, lam=0.3, lr=10.0, momentum=0.5, iterations=20, *, batches=1, preference=None):
        self.lam, self.lr, self.momentum, self.iterations = lam, lr, momentum, iterations
        self.batches, self.preference = batches, preference
        self.weights = None

    def __call__(self, J):
        parts = split_batches(J, self.batches)
        J_1, J_2 = parts[0], parts[min(1, self.batches - 1)]
        K = len(J_1)
        p = torch.full((K,), 1 / K, dtype=J.dtype)
        if self.preference is not None:
            p = torch.tensor(self.preference, dtype=J.dtype)
        if self.weights is None:
            self.weights = torch.full((K,), 1 / K, dtype=J.dtype)
        unit = sum(max(float(g @ h), 0.0) ** 0.5 for g, h in zip(J_1, J_2, strict=True)) / K
        w, velocity = self.weights, torch.zeros(K, dtype=J.dtype)
        for _ in range(self.iterations):
            direction = (w + self.lam * p) @ J_2
            slope = torch.stack([(g / unit) @ (direction / unit) if unit > 0 else 0 * g.sum() for g in J_1])
            velocity = self.momentum * velocity + slope
            w = project_on_simplex(w - self.lr * velocity)
        self.weights = w
        stepped = stepped_batch(parts)
        return (w @ stepped + self.lam * (p @ stepped)) / (1 + self.lam)
