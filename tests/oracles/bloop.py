"""Bloop on raw gradients: Hsieh et al. 2024, arXiv:2402.02998, Eq. 5 and Algorithm 1."""

from __future__ import annotations


class Bloop:
    """d = g_main + lambda (a - <m, a> / <m, m> m), m the average of g_main, a the sum of the auxiliaries.

    As in the official code, m starts as the first g_main and takes in each g_main before it is used.
    """

    def __init__(self, lam=0.1, rho=0.1, anchor=0):
        self.lam, self.rho, self.anchor = lam, rho, anchor
        self.average = None

    def __call__(self, J):
        main = J[self.anchor]
        auxiliary = 0 * main
        for k, g in enumerate(J):
            if k != self.anchor:
                auxiliary = auxiliary + g
        m = main if self.average is None else (1 - self.rho) * self.average + self.rho * main
        self.average = m
        length = m.norm()
        if length > 0:
            auxiliary = auxiliary - (auxiliary @ (m / length)) * (m / length)
        return main + self.lam * auxiliary
