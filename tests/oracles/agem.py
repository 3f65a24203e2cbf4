"""A-GEM on raw gradients: Chaudhry et al. 2019, arXiv:1812.00420, Eq. 11."""

from __future__ import annotations


def agem(J, anchor):
    """The current task's gradient, projected where it would raise the loss of the memory (all other groups)."""
    g = J[anchor]
    g_ref = sum(h for k, h in enumerate(J) if k != anchor)
    if g @ g_ref >= 0:
        return g
    return g - (g @ g_ref) / (g_ref @ g_ref) * g_ref
