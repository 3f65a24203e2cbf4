"""What the aligned gradient has to be, by hand: torch.autograd.grad of each loss, and the rules written out.

Gradients are lists, one entry a parameter, None where a loss does not reach it.
"""

from __future__ import annotations

import torch
from torch.testing import assert_close

ALPHA = 0.3  # of ga-soft


def raw(losses, parameters, scale=1.0):
    """Each loss's gradient, of the loss times a scale and divided by it again."""
    rows = [
        torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True) for loss in losses.values()
    ]
    return [[None if g is None else g / scale for g in row] for row in rows]


def plain(losses, parameters):
    """What ``backward()`` on the summed losses leaves in ``p.grad``; the parameters' own is taken away again."""
    assert all(p.grad is None for p in parameters)
    sum(losses.values()).backward()
    return taken(parameters)


def taken(parameters):
    """Return ``p.grad`` of each parameter and leave None there."""
    parameters = list(parameters)
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return gradients


def gramian(rows):
    G = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
            G[i, j] = sum((a.double() * b.double()).sum() for a, b in pairs)
    return G


def weights(rule, G):
    """The weights of K gradients with the Gramian G; PCGrad for one or two, whose order does not matter."""
    ones = torch.ones(len(G), dtype=torch.float64)
    if rule == "sum" or (rule == "pcgrad" and len(G) == 1):
        return ones
    if rule == "pcgrad":
        # d = g_1 + g_2 - (min(G_12, 0) / G_22) g_2 - (min(G_12, 0) / G_11) g_1
        assert len(G) == 2
        return ones - G[0, 1].clamp(max=0) / G.diagonal()
    # d = (1 - alpha) g_a + alpha sum_k <g_k, g_a> / <g_a, g_a> g_a
    assert rule == "ga-soft"
    w = torch.zeros_like(ones)
    w[0] = (1 - ALPHA) + ALPHA * G[0, 1:].sum() / G[0, 0]
    return w


def combined(rule, rows):
    """The aligned gradient; None where no loss reaches a parameter."""
    w = weights(rule, gramian(rows)).tolist()
    aligned = []
    for column in zip(*rows, strict=True):
        reached = [(weight, g) for weight, g in zip(w, column, strict=True) if g is not None]
        total = sum(weight * g.double() for weight, g in reached)
        aligned.append(total.to(reached[0][1]) if reached else None)
    return aligned


def assert_same(actual, expected, *, zeros_may_lack=False, **tolerance):
    """Assert that two gradients are equal; a probe gives None for zeros where the main loss does not reach."""
    assert len(actual) == len(expected)
    for i, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        if ours is None:
            assert reference is None or (zeros_may_lack and not reference.any()), i
        else:
            assert reference is not None, i
            assert_close(ours, reference, msg=lambda text, i=i: f"parameter {i}: {text}", **tolerance)
