from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import FairGradWeighting

from gradalign.rules import FairGrad, NashMTL
from tests.oracles import fairgrad
from tests.oracles.agreement import assert_agrees, generator
from tests.rules.test_nash_mtl import assume_a_bargain
from tests.strategies import (
    PUBLISHED,
    SCALES,
    badly_scaled,
    conflicting,
    duplicated,
    full_rank,
    gradients,
    gramian_of,
    rank_deficient,
)

ALPHAS = st.sampled_from([0.5, 1.0, 2.0, 5.0])
# Not the draws of norms 1e24 apart: the oracle's Newton steps are taken in d, whose shares are then out of its sight.
COMPARABLE = st.integers(1, 6).flatmap(
    lambda K: st.one_of(full_rank(K), conflicting(K), rank_deficient(K), duplicated(K))
)


@given(J=COMPARABLE, scale=SCALES, alpha=ALPHAS)
def test_agrees_with_the_fairest_step_over_raw_gradients(J, scale, alpha):
    J = J * scale
    assume_a_bargain(J)
    assume(J.norm(dim=1).max() < 100 * J.norm(dim=1).min())
    assert_agrees(J, FairGrad(alpha)(gramian_of(J)), fairgrad.aligned_gradient(J, alpha))


@given(J=gradients(), scale=SCALES, alpha=st.sampled_from([0.5, 1.0, 2.0]))
def test_solves_its_equation(J, scale, alpha):
    J = J * scale
    assume_a_bargain(J)
    G = gramian_of(J)
    w = FairGrad(alpha)(G)
    assert (w > 0).all()
    # Gw is a sum of terms that can cancel: relative to those.
    terms = G.abs() @ w
    assert_close((G @ w) / terms, w ** (-1 / alpha) / terms)


@given(J=COMPARABLE, scale=SCALES)
def test_nash_is_the_fairness_of_one(J, scale):
    J = J * scale
    assume_a_bargain(J)
    assert_agrees(J, FairGrad(1.0)(gramian_of(J)), J.T @ NashMTL()(gramian_of(J)))


def test_published_example():
    # alpha = 1 is Nash: w_i = 1 / (norm(g_i) sqrt(1 + cos)), see test_nash_mtl.
    G = gramian_of(PUBLISHED)
    expected = 1 / (G.diagonal() * (1 - 22 / (18 * 38) ** 0.5)).sqrt()
    w = FairGrad(1.0)(G)
    assert_close(w, expected)
    published = torch.tensor([0.5915, 0.4071], dtype=torch.float64)
    assert_close(w, published, rtol=0, atol=1e-4)  # its digits


def test_by_hand():
    # Orthogonal: G_ii w_i = w_i^(-1/alpha), w_i = G_ii^(-alpha / (1 + alpha)); alpha = 2: 8^(-2/3) = 1/4.
    G = torch.diag(torch.tensor([8.0, 1.0, 27.0], dtype=torch.float64))
    assert_close(FairGrad(2.0)(G), torch.tensor([1 / 4, 1.0, 1 / 9], dtype=torch.float64))
    # K = 1, alpha = 3: w = 16^(-3/4) = 1/8.
    assert_close(FairGrad(3.0)(torch.tensor([[16.0]])), torch.tensor([1 / 8]))
    # Two of unit norm and cosine c: (1 + c) w = w^(-1/2), w = (1 + c)^(-2/3); c = -7/8: 8^(2/3) = 4.
    G = torch.tensor([[1.0, -0.875], [-0.875, 1.0]], dtype=torch.float64)
    assert_close(FairGrad(2.0)(G), torch.tensor([4.0, 4.0], dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_stationary_losses_and_zero_gradients_give_finite_weights(alpha):
    w = FairGrad(alpha)(torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))
    assert w.isfinite().all()
    assert (w >= 0).all()
    G = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(FairGrad(alpha)(G), torch.tensor([1.0, 0.0], dtype=torch.float64))


@given(
    J=st.integers(2, 4).flatmap(lambda K: st.one_of(full_rank(K), conflicting(K))), alpha=st.sampled_from([1.0, 2.0])
)
def test_agrees_with_torchjd(J, alpha):
    assume_a_bargain(J)
    G = gramian_of(J)
    theirs = FairGradWeighting(alpha)(G)
    residual = (G @ theirs - theirs ** (-1 / alpha)).abs().max()
    assume(residual < 1e-6)  # its least squares can end elsewhere
    # It stops at a relative change of 1e-8 in the squared residual.
    assert_agrees(J, FairGrad(alpha)(G), J.T @ theirs, tolerance=1e-4)


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_an_alpha_that_is_not_positive_is_refused(alpha):
    with pytest.raises(ValueError, match=r"`alpha` must be finite and at least 0, got"):
        FairGrad(alpha)


def test_other_bad_alphas_are_refused():
    with pytest.raises(ValueError, match=r"`alpha` must be above 0, got 0"):
        FairGrad(0)
    with pytest.raises(TypeError, match=r"`alpha` must be a number, got 'fair'"):
        FairGrad("fair")


@given(J=st.integers(2, 6).flatmap(badly_scaled), seed=st.integers(0, 99))
def test_steps_that_would_climb_are_halved(J, seed):
    # At alpha = .1 a whole step of Newton's method can leave some weights too long by orders of magnitude.
    J = J / J.norm(dim=1, keepdim=True) * 10.0 ** torch.randint(-4, 5, (len(J), 1), generator=generator(seed))
    assume_a_bargain(J)
    G = gramian_of(J)
    w = FairGrad(0.1)(G)
    terms = G.abs() @ w
    assert_close((G @ w) / terms, w**-10.0 / terms)
