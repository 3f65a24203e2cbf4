from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import IMTLGWeighting

from gradalign.rules import IMTLG
from tests.oracles import imtl_g
from tests.oracles.agreement import assert_agrees
from tests.strategies import PUBLISHED, SCALES, badly_scaled, conflicting, full_rank, gradients, gramian_of, unit_rows

INDEPENDENT = st.integers(1, 5).flatmap(lambda K: st.one_of(full_rank(K), conflicting(K), badly_scaled(K)))


def assume_a_scale(w):
    """The weights' sum, by which they are divided, is more than what rounding leaves of their sizes."""
    assume(w.sum().abs() > 1e-4 * w.abs().sum())


@given(J=INDEPENDENT, scale=SCALES)
def test_agrees_with_the_closed_form_on_raw_gradients(J, scale):
    J = J * scale
    assume(torch.linalg.cond(unit_rows(J)) < 1e3)
    w = IMTLG()(gramian_of(J))
    assume(w.abs().sum() < 1e3)  # their sum is 1
    # The closed form of gradients that differ by 24 orders of magnitude inverts differences of theirs: scaled first.
    assume(J.norm(dim=1).max() < 1e4 * J.norm(dim=1).min())
    assert_agrees(J, w, imtl_g.aligned_gradient(J))


@given(J=gradients(), scale=SCALES)
def test_dependent_gradients_take_the_direction_that_comes_nearest(J, scale):
    J = J * scale
    singular = torch.linalg.svdvals(unit_rows(J))
    assume(not ((singular > 1e-12 * singular.max()) & (singular < 1e-4 * singular.max())).any())  # of clear rank
    direction = imtl_g.common_direction(J)
    assume(direction.norm() > 1e-6)
    w = IMTLG()(gramian_of(J))
    assume(w.abs().sum() < 1e3)
    d = J.T @ w
    size = (w.abs() * J.norm(dim=1)).sum()
    assert_close(d / size, d @ direction / direction.square().sum() * direction / size)


@given(J=INDEPENDENT, scale=SCALES)
def test_projections_on_all_gradients_are_equal(J, scale):
    J = J * scale
    assume(torch.linalg.cond(unit_rows(J)) < 1e3)
    G = gramian_of(J)
    w = IMTLG()(G)
    size = (w.abs() * J.norm(dim=1)).sum()
    projections = G @ w / J.norm(dim=1) / size
    assert_close(projections, projections.mean().expand(len(J)))


@given(J=gradients(min_groups=2, max_groups=2), scale=SCALES)
def test_two_groups_in_closed_form(J, scale):
    # Each as long as the other: w = (norm(g_2), norm(g_1)) / (norm(g_1) + norm(g_2)).
    J = J * scale
    norms = J.norm(dim=1)
    assume(bool((norms > 0).all()))
    cosine = unit_rows(J)[0] @ unit_rows(J)[1]
    assume(1 + cosine > 1e-6)  # opposite gradients have no such direction
    assert_close(IMTLG()(gramian_of(J)), norms.flip(0) / norms.sum())


def test_published_example():
    # sqrt 38 and sqrt 18 over their sum.
    J = PUBLISHED
    total = 38**0.5 + 18**0.5
    w = IMTLG()(gramian_of(J))
    assert_close(w, torch.tensor([38**0.5 / total, 18**0.5 / total], dtype=torch.float64))
    published = torch.tensor([0.5923, 0.4077], dtype=torch.float64)
    assert_close(w, published, rtol=0, atol=5e-5)  # its digits


def test_by_hand():
    # Orthogonal: w_i ~ 1 / norm(g_i): (1/2, 1, 1/4) / 1.75.
    G = torch.diag(torch.tensor([4.0, 1.0, 16.0], dtype=torch.float64))
    assert_close(IMTLG()(G), torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64) / 7)
    assert_close(IMTLG()(torch.tensor([[9.0]])), torch.tensor([1.0]))


def test_parallel_and_zero_gradients():
    # g, 2g: the least-squares u is (1/2, 1/2), w ~ (1/2, 1/4).
    G = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(IMTLG()(G), torch.tensor([2 / 3, 1 / 3, 0.0], dtype=torch.float64))
    assert_close(IMTLG()(torch.zeros(2, 2)), torch.zeros(2))


@given(J=st.integers(2, 5).flatmap(lambda K: st.one_of(full_rank(K), conflicting(K))))
def test_agrees_with_torchjd(J):
    G = gramian_of(J)
    assume(torch.linalg.cond(G) < 1e6)
    theirs = IMTLGWeighting()(G)
    assume(theirs.abs().sum() < 1e3)
    assert_close(IMTLG()(G), theirs, rtol=1e-6, atol=1e-6)  # both carry the condition of G times rounding


def test_a_small_sum_is_still_a_sum():
    # Norms 1, 1, r, cosines a between the first two and b with the third: Cu = 1 has u_1 = u_2
    # = (1 - b) / (1 + a - 2 b^2) = .03 / .0182 and u_3 = 1 - 2 b u_1 = -2.198. The sum 3.297 - 2.198 / r is .011 for
    # r = .669, its terms are 6.6 together.
    a, b, r = 0.9, 0.97, 0.669
    C = torch.tensor([[1.0, a, b], [a, 1.0, b], [b, b, 1.0]], dtype=torch.float64)
    norms = torch.tensor([1.0, 1.0, r], dtype=torch.float64)
    u = torch.linalg.solve(C, torch.ones(3, dtype=torch.float64))
    w = u / norms
    assert w.sum().abs() < 5e-3 * w.abs().sum()
    assert_close(IMTLG()(C * norms.outer(norms)), w / w.sum(), rtol=1e-9, atol=0)  # eps, times the cancellation
