"""GradVac: Wang et al. 2021, arXiv:2010.05874, Algorithm 1, with the whole model as the one component."""

from __future__ import annotations

import torch


def aligned_gradients(steps, orders, beta):
    """The sums of the altered gradients, one for each step; orders[t][i] are the j that group i meets at step t.

    phi, the cosine, compares the altered g_i with the plain g_j. It has no value where one of them is 0: nothing is
    altered there, and the pair's target stays. What opposite gradients leave of one another, rounding, counts as 0.
    """
    K = len(steps[0])
    target = [[0.0] * K for _ in range(K)]
    result = []
    for J, order in zip(steps, orders, strict=True):
        total = torch.zeros_like(J[0])
        for i in range(K):
            altered = J[i].clone()
            for j in order[i]:
                g, length = J[j], altered.norm().item()
                if length <= 1e-12 * J[i].norm() or g.norm() == 0:
                    continue
                phi = ((altered / length) @ (g / g.norm())).clamp(-1, 1).item()
                aim = target[i][j]
                if phi < aim:
                    gain = aim * (1 - phi**2) ** 0.5 - phi * (1 - aim**2) ** 0.5
                    altered = altered + length * gain / (1 - aim**2) ** 0.5 * (g / g.norm())
                target[i][j] = (1 - beta) * aim + beta * phi
            total = total + altered
        result.append(total)
    return result
