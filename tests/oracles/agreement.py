"""How far an aligned gradient may lie from an oracle's: relative to the terms that add up to it."""

from __future__ import annotations

from torch.testing import assert_close


def size_of_terms(J, w):
    """sum_i |w_i| norm(g_i): the terms can cancel, and rounding is relative to them, not to what is left."""
    return (w.abs() * J.norm(dim=1)).sum()


def assert_agrees(J, w, expected, **tolerance):
    """J' w is the aligned gradient expected, up to the default tolerance of float64 or the one given."""
    size = size_of_terms(J, w).clamp(min=1e-300)
    assert_close(J.T @ w / size, expected / size, **tolerance)
