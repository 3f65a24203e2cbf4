"""PCGrad on raw gradients: Yu et al. 2020, arXiv:2001.06782, Algorithm 1."""

from __future__ import annotations

import torch


def pcgrad(J, orders):
    """Project each gradient onto the others' normal planes, in the given orders, and add the results."""
    total = torch.zeros_like(J[0])
    for i in range(len(J)):
        g = J[i].clone()
        for j in orders[i]:
            product = g @ J[j]
            if product < 0:
                g = g - product / (J[j] @ J[j]) * J[j]
        total = total + g
    return total
