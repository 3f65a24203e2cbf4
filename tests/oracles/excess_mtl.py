"""ExcessMTL on raw gradients: He et al., ICML 2024, arXiv:2402.02009, Eq. 6, 7 and 9 and the scaling of Sec. 3.2."""

from __future__ import annotations

import math

import torch


class ExcessMTL:
    """Multiplicative weights on each group's estimated excess risk, relative to its first."""

    def __init__(self, lr=1.0):
        self.lr = lr
        self.squares, self.first, self.weights = None, None, None

    def __call__(self, J):
        if self.squares is None:
            self.squares = torch.zeros_like(J)
        self.squares = self.squares + J**2
        risks = []
        for g, history in zip(J.tolist(), self.squares.tolist(), strict=True):
            risks.append(sum(x * x / math.sqrt(s) for x, s in zip(g, history, strict=True) if s > 0))
        if self.first is None:
            self.first, self.weights = risks, [1 / len(J)] * len(J)
        ratios = [risk / first if first > 0 else 0.0 for risk, first in zip(risks, self.first, strict=True)]
        logs = [math.log(w) + self.lr * r if w > 0 else -math.inf for w, r in zip(self.weights, ratios, strict=True)]
        grown = [math.exp(log - max(logs)) for log in logs]
        self.weights = [w / sum(grown) for w in grown]
        return sum(w * g for w, g in zip(self.weights, J, strict=True))
