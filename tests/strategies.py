"""Matrices of gradients that are hard for a rule, as hypothesis strategies.

Each draws J (K, P) in float64; its Gramian is J @ J.T.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st

# The catalogue's published values are for these.
PUBLISHED = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
SCALES = st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12])


def _normal(draw, rows, columns):
    seed = draw(st.integers(0, 2**31 - 1))
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def full_rank(draw, K):
    """Independent gradients in general position."""
    return _normal(draw, K, K + draw(st.integers(0, 5)))


@st.composite
def rank_deficient(draw, K):
    """More gradients than dimensions."""
    return _normal(draw, K, draw(st.integers(1, max(1, K - 1))))


@st.composite
def nearly_parallel(draw, K):
    """One direction, both ways, and a breath of noise."""
    direction = _normal(draw, 1, 6)
    signs = torch.tensor(draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=K, max_size=K)), dtype=torch.float64)
    return signs[:, None] * direction + draw(st.sampled_from([1e-10, 1e-7, 1e-4])) * _normal(draw, K, 6)


@st.composite
def duplicated(draw, K):
    """Some gradients are the same, some exact opposites."""
    J = _normal(draw, K, 5)
    for k in range(1, K):
        if draw(st.booleans()):
            J[k] = J[draw(st.integers(0, k - 1))] * draw(st.sampled_from([1.0, -1.0]))
    return J


@st.composite
def with_zeros(draw, K):
    """Some gradients are zero, perhaps all."""
    J = _normal(draw, K, 5)
    for k in range(K):
        if draw(st.booleans()):
            J[k] = 0.0
    return J


@st.composite
def badly_scaled(draw, K):
    """Norms that differ by up to 24 orders of magnitude."""
    return _normal(draw, K, 5) * torch.tensor([draw(SCALES) for _ in range(K)], dtype=torch.float64)[:, None]


@st.composite
def conflicting(draw, K):
    """Every pair conflicts: a simplex's corners around the origin, jittered."""
    J = torch.eye(K, dtype=torch.float64) - 1.0 / max(K - 1, 1) * (1 - torch.eye(K, dtype=torch.float64))
    return J + 0.1 * _normal(draw, K, K)


def gradients(min_groups=1, max_groups=6):
    """All of the above."""
    kinds = (full_rank, rank_deficient, nearly_parallel, duplicated, with_zeros, badly_scaled, conflicting)
    return st.integers(min_groups, max_groups).flatmap(lambda K: st.one_of(*(kind(K) for kind in kinds)))


def gramian_of(J):
    return J @ J.T


def unit_rows(J):
    """J with rows of length 1, a zero row left as it is."""
    norms = J.norm(dim=1, keepdim=True)
    return J / norms.where(norms > 0, 1.0)


def preferences(K, seed):
    """K numbers in [0, 1)."""
    return torch.rand(K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
