from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import AlignedMTLWeighting

from gradalign.rules import AlignedMTL
from tests.oracles import aligned_mtl
from tests.oracles.agreement import assert_agrees, clear_rank
from tests.strategies import PUBLISHED, SCALES, conflicting, full_rank, gradients, gramian_of, preferences

ROTATED = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)  # eigenvalues 3 along (1, 1), 1 along (1, -1)


@given(J=gradients(), scale=SCALES, how=st.sampled_from(["min", "median", "mean"]), seed=st.integers(0, 99))
def test_agrees_with_the_singular_values_of_raw_gradients(J, scale, how, seed):
    J, p = J * scale, preferences(len(J), seed)
    kept = clear_rank(J)
    expected = aligned_mtl.aligned_gradient(J, p, how)
    # Every eigenvalue of G, a square, carries the rounding of the largest.
    rounding = 1e-15 * (kept.max() / kept.min()).item() ** 2 if len(kept) else 0.0
    assert_agrees(J, AlignedMTL(how, preference=p)(gramian_of(J)), expected, tolerance=max(1e-12, rounding))


@pytest.mark.parametrize("how", ["min", "median", "mean"])
@given(K=st.integers(1, 5), data=st.data(), scale=SCALES)
def test_aligned_gradients_are_orthogonal_and_equally_long(how, K, data, scale):
    J = data.draw(st.one_of(full_rank(K), conflicting(K)), label="J") * scale
    assume(torch.linalg.cond(J) < 1e3)
    G = gramian_of(J)
    B = torch.stack([AlignedMTL(how, preference=row)(G) for row in torch.eye(K, dtype=torch.float64)])
    squares = torch.linalg.svdvals(J).square()
    s = {"min": squares.min(), "median": squares.median(), "mean": squares.mean()}[how]
    assert_close(B @ G @ B.T / s, torch.eye(K, dtype=torch.float64))


def test_published_example():
    # G = [[18, -22], [-22, 38]]: B = sqrt(s) G^(-1/2), s = 28 - sqrt(584), the lesser eigenvalue. With r = sqrt(det G)
    # = sqrt 200 and t = sqrt(trace + 2 r), G^(1/2) = (G + r I) / t and det G^(1/2) = r, so that
    # G^(-1/2) = [[38 + r, 22], [22, 18 + r]] / (r t).
    J = PUBLISHED
    r, s = 200**0.5, 28 - 584**0.5
    factor = s**0.5 / (r * (56 + 2 * r) ** 0.5) / 2
    w = AlignedMTL()(gramian_of(J))
    assert_close(w, factor * torch.tensor([60 + r, 40 + r], dtype=torch.float64))
    published = torch.tensor([0.5591, 0.4083], dtype=torch.float64)
    assert_close(w, published, rtol=0, atol=5e-5)  # its digits


def test_by_hand():
    # diag(4, 1): B = sqrt(s) diag(1/2, 1), s = 1, the least, or 2.5, the mean; p = (1/2, 1/2).
    G = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    assert_close(AlignedMTL()(G), torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert_close(AlignedMTL("mean")(G), 2.5**0.5 * torch.tensor([0.25, 0.5], dtype=torch.float64))
    # diag(4, 1, 9): s = 4, B = diag(1, 2, 2/3).
    G = torch.diag(torch.tensor([4.0, 1.0, 9.0], dtype=torch.float64))
    assert_close(AlignedMTL("median")(G), torch.tensor([1.0, 2.0, 2 / 3], dtype=torch.float64) / 3)
    # diag(4, 1): of an even number the lower one is the median, as in the authors' code.
    G = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    assert_close(AlignedMTL("median")(G), torch.tensor([0.25, 0.5], dtype=torch.float64))
    # p along an eigenvector: B p = sqrt(1 / 3) p.
    assert_close(AlignedMTL()(ROTATED), torch.full((2,), 0.5 / 3**0.5, dtype=torch.float64))
    assert_close(AlignedMTL()(torch.tensor([[9.0]])), torch.tensor([1.0]))


def test_parallel_opposite_and_zero_gradients():
    # Rank 1: the one component, in its own length. norm(g) = sqrt 5: (g, 2g, 0) has the component sqrt 5 g along
    # (1, 2, 0) / sqrt 5, and p's share of that is 1 / sqrt 5: B p = (1, 2, 0) / 5 * 3 / 3.
    J = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(AlignedMTL()(gramian_of(J)), torch.tensor([0.2, 0.4, 0.0], dtype=torch.float64))
    opposite = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    assert_close(AlignedMTL()(gramian_of(opposite)), torch.zeros(2, dtype=torch.float64))
    for scale in ("min", "median", "mean"):
        w = AlignedMTL(scale)(torch.zeros(3, 3, dtype=torch.float64))
        assert w.isfinite().all()


@pytest.mark.parametrize(("ours", "theirs"), [("min", "min"), ("median", "median"), ("mean", "rmse")])
@given(J=gradients(), seed=st.integers(0, 99))
def test_agrees_with_torchjd(ours, theirs, J, seed):
    clear_rank(J)
    assume(bool(J.any()))  # of nothing but zeros it makes the mean
    p = preferences(len(J), seed)
    G = gramian_of(J)
    # Both decompose G, whose small eigenvalues carry the rounding of the largest: torch's default for float64.
    assert_agrees(J, AlignedMTL(ours, preference=p)(G), J.T @ AlignedMTLWeighting(p, theirs)(G), tolerance=1e-7)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"`scale` must be one of 'min', 'median', 'mean', got 'max'"):
        AlignedMTL("max")
