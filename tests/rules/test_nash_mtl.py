from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import NashMTL as TorchJDNashMTL

from gradalign.rules import NashMTL
from tests.oracles import mgda, nash_mtl
from tests.oracles.agreement import assert_agrees
from tests.strategies import PUBLISHED, SCALES, conflicting, full_rank, gradients, gramian_of


def assume_a_bargain(J):
    """Some d has a positive cosine with all gradients: the hull of the unit gradients stays away from 0.

    d is as sensitive to the rounding of G as the inverse square of that distance.
    """
    norms = J.norm(dim=1, keepdim=True)
    assume(bool((norms > 0).all()))
    assume(mgda.aligned_gradient(J / norms).norm() > 1e-3)


@given(J=gradients(), scale=SCALES, max_norm=st.sampled_from([None, 0.3, 1.0]))
def test_agrees_with_the_bargain_over_raw_gradients(J, scale, max_norm):
    J = J * scale
    assume_a_bargain(J)
    assert_agrees(J, NashMTL(max_norm)(gramian_of(J)), nash_mtl.aligned_gradient(J, max_norm))


@given(J=gradients(), scale=SCALES)
def test_every_share_is_one(J, scale):
    J = J * scale
    assume_a_bargain(J)
    G = gramian_of(J)
    w = NashMTL()(G)
    assert (w > 0).all()
    # Gw is a difference of terms up to 1e3 times as large, the inverse of the distance assumed.
    assert_close(w * (G @ w), torch.ones_like(w), rtol=1e-7, atol=0)
    assert_close(w @ G @ w, torch.tensor(float(len(J)), dtype=torch.float64))


def test_published_example():
    # K = 2: G_11 w_1² + G_12 w_1 w_2 = 1 = G_22 w_2² + G_12 w_1 w_2, so that w_i = 1 / (norm(g_i) sqrt(1 + cos)).
    G = gramian_of(PUBLISHED)
    cos = -22 / (18 * 38) ** 0.5
    expected = 1 / (G.diagonal() * (1 + cos)).sqrt()
    assert_close(NashMTL()(G), expected)
    # d = J'w has the norm sqrt 2: clipped to 1 it is d / sqrt 2, as published.
    clipped = NashMTL(max_norm=1.0)(G)
    assert_close(clipped, expected / 2**0.5)
    published = torch.tensor([0.0542, 0.7061, 0.7061], dtype=torch.float64)
    assert_close(PUBLISHED.T @ clipped, published, rtol=0, atol=5e-5)  # its digits


def test_by_hand():
    # Orthogonal: w_i = 1 / norm(g_i). One group: the unit vector along it.
    G = torch.diag(torch.tensor([4.0, 0.25, 100.0], dtype=torch.float64))
    assert_close(NashMTL()(G), torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64))
    assert_close(NashMTL()(torch.tensor([[9.0]])), torch.tensor([1 / 3]))
    # K copies of g: d = sqrt(K) g / norm(g), in equal shares.
    assert_close(NashMTL()(4 * torch.ones(4, 4, dtype=torch.float64)), torch.full((4,), 0.25, dtype=torch.float64))


def test_max_norm_shortens_and_never_lengthens():
    G = 4 * torch.eye(2, dtype=torch.float64)  # norm(d) = sqrt 2
    assert_close(NashMTL(5.0)(G), NashMTL()(G))
    assert_close(NashMTL(0.1)(G), NashMTL()(G) * 0.1 / 2**0.5)


@given(K=st.integers(2, 4), data=st.data(), every=st.integers(1, 3))
def test_weights_are_solved_at_every_nth_call(K, data, every):
    steps = [data.draw(full_rank(K), label="J") for _ in range(5)]
    for J in steps:
        assume_a_bargain(J)
        assume(torch.linalg.cond(J) < 1e3)  # the oracle finds a from d
    rule = NashMTL(update_every=every)
    for J, expected in zip(steps, nash_mtl.aligned_gradients(steps, every), strict=True):
        assert_agrees(J, rule(gramian_of(J)), expected)


def test_weights_between_are_clipped_on_the_present_gradients():
    rule = NashMTL(max_norm=1.0, update_every=2)
    G = torch.eye(2, dtype=torch.float64)
    rule(G)  # w = (1, 1), shortened to norm 1
    longer = rule(100 * G)  # the same w would be sqrt 200 long
    assert_close(longer @ (100 * G) @ longer, torch.ones((), dtype=torch.float64))
    assert_close(rule(100 * G), longer)  # solved anew: w = (.1, .1), shortened to norm 1


def test_stationary_losses_and_zero_gradients_give_finite_weights():
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    w = NashMTL(max_norm=1.0)(opposite)
    assert w.isfinite().all()
    assert (w >= 0).all()
    assert w @ opposite @ w <= 1 + 1e-9
    G = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(NashMTL()(G), torch.tensor([0.5, 0.0], dtype=torch.float64))


# Its disciplined problem warns of a solver that cvxpy means to drop, and of ways to make it faster.
@pytest.mark.filterwarnings("ignore")
@given(J=st.integers(2, 4).flatmap(lambda K: st.one_of(full_rank(K), conflicting(K))))
def test_agrees_with_torchjd(J):
    assume_a_bargain(J)
    theirs = TorchJDNashMTL(n_tasks=len(J), max_norm=1.0, optim_niter=100)(J)
    # Its iteration need not arrive; at the bargain, d is along sum_i g_i / <g_i, d>.
    demanded = J.T @ (1 / (J @ theirs))
    assume((demanded / demanded.norm() - theirs / theirs.norm()).norm() < 1e-3)
    # It stops at 1e-3 in the equation, the bargain's distance then depends on the conflict; and it clips to 1.
    ours = J.T @ NashMTL()(gramian_of(J))
    assert_close(ours / ours.norm(), theirs / theirs.norm(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("max_norm", [-1.0, math.inf, math.nan])
def test_a_bad_norm_is_refused(max_norm):
    with pytest.raises(ValueError, match=r"`max_norm` must be finite and at least 0, got"):
        NashMTL(max_norm)


def test_other_bad_hyper_parameters_are_refused():
    with pytest.raises(ValueError, match=r"`max_norm` must be above 0 or None, got 0"):
        NashMTL(0)
    with pytest.raises(ValueError, match=r"`update_every` must be at least 1, got 0"):
        NashMTL(update_every=0)
    with pytest.raises(TypeError, match=r"`update_every` must be an integer, got 1.5"):
        NashMTL(update_every=1.5)
