"""MoCo on raw gradients: Fernando et al., ICLR 2023, Mitigating Gradient Bias in Multi-objective Learning, Alg. 1."""

from __future__ import annotations

import torch

from tests.oracles.modo import project_on_simplex


class MoCo:
    """y_i tracks g_i; lambda <- Proj(lambda - gamma (Y Y' + rho I) lambda); d = Y'lambda, both new."""

    def __init__(self, beta=0.5, gamma=0.1, rho=0.0, *, relative=True):
        self.beta, self.gamma, self.rho, self.relative = beta, gamma, rho, relative
        self.tracked, self.weights = None, None

    def __call__(self, J):
        K = len(J)
        if self.tracked is None:
            self.tracked, self.weights = [g.clone() for g in J], torch.full((K,), 1 / K, dtype=J.dtype)
        else:
            self.tracked = [y - self.beta * (y - g) for y, g in zip(self.tracked, J, strict=True)]
        direction = sum(w * y for w, y in zip(self.weights, self.tracked, strict=True))
        slope = torch.stack([y @ direction for y in self.tracked])
        if self.relative:
            unit = sum(float(y @ y) for y in self.tracked) / K
            slope = slope / unit if unit > 0 else 0 * slope
        self.weights = project_on_simplex(self.weights - self.gamma * (slope + self.rho * self.weights))
        return sum(w * y for w, y in zip(self.weights, self.tracked, strict=True))
