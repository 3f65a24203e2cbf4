from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import CAGradWeighting

from gradalign.rules import CAGrad
from gradalign.solvers import best_move_in_ball
from tests.oracles import cagrad, mgda
from tests.oracles.agreement import assert_agrees
from tests.oracles.cases_symmetric import mean
from tests.strategies import PUBLISHED, SCALES, conflicting, full_rank, gradients, gramian_of, preferences

RADII = st.sampled_from([0.1, 0.4, 0.9])


@given(J=gradients(), scale=SCALES, c=RADII, seed=st.integers(0, 99))
def test_agrees_with_the_best_step_in_the_ball_of_raw_gradients(J, scale, c, seed):
    J, p = J * scale, preferences(len(J), seed)
    # Pareto-stationary losses can have many best steps; the next test compares what those are worth.
    assume(mgda.aligned_gradient(J).norm() > 1e-3 * J.norm(dim=1).min())
    # All but stationary still: a difference of 1e-16 in G is one of 1e-16 / 1e-6 here.
    assert_agrees(J, CAGrad(c, preference=p)(gramian_of(J)), cagrad.aligned_gradient(J, c, p), tolerance=1e-7)


@given(J=gradients(), scale=SCALES, c=RADII)
def test_no_step_in_the_ball_serves_the_worst_off_better(J, scale, c):
    J, p = J * scale, mean(J)
    g_0 = J.T @ p
    sizes = J.norm(dim=1)
    d = J.T @ CAGrad(c)(gramian_of(J))
    # What is left of a sum that all but cancels is known from G up to the root of its rounding, 1.5e-8 of its terms.
    length = p @ sizes
    assert (d - g_0).norm() <= c * g_0.norm() + 1e-7 * length
    best = cagrad.worst(J, cagrad.aligned_gradient(J, c, p))
    assert cagrad.worst(J, d) >= best - 1e-7 * sizes.max() * length


@given(J=gradients(), scale=SCALES, c=RADII, seed=st.integers(0, 99))
def test_goes_to_the_edge_of_the_ball_unless_stationary(J, scale, c, seed):
    J, p = J * scale, preferences(len(J), seed)
    assume(mgda.aligned_gradient(J).norm() > 1e-3 * J.norm(dim=1).max())
    g_0 = J.T @ p
    assert_close((J.T @ CAGrad(c, preference=p)(gramian_of(J)) - g_0).norm(), c * g_0.norm())


@pytest.mark.parametrize(
    ("J", "p", "c"),
    [
        ([[1.5, -0.3], [-2.2, 0.6], [-1.1, -1.4]], [1.0, 1.0, 1.0], 0.9),
        ([[-3.0, -3, 0], [1, 2, 3], [-1, -1, 2], [8, 7, -9]], [1.0, 1, 2 / 3, 1 / 3], 0.4),
    ],
)
def test_stays_in_the_ball_where_losses_are_stationary_and_no_harm_lies_outside(J, p, c):
    J, p = torch.tensor(J, dtype=torch.float64), torch.tensor(p, dtype=torch.float64)
    g_0 = J.T @ p
    d = J.T @ (p + best_move_in_ball(J @ J.T, p, c))
    assert_close((d - g_0).norm(), c * g_0.norm())
    assert (J @ d).min() < -1e-6  # the best there is does harm


def test_published_example():
    # G = [[18, -22], [-22, 38]], p'Gp = 3: the worst-off is g_1 all along, w* = e_1, w_1 = 1/2 + c sqrt(3/18).
    J = PUBLISHED
    expected = torch.tensor([0.5 + 0.5 / 6**0.5, 0.5], dtype=torch.float64)
    assert_close(expected, torch.tensor([0.7041, 0.5], dtype=torch.float64), rtol=0, atol=5e-5)  # as published
    assert_close(CAGrad(0.5)(gramian_of(J)), expected)


def test_by_hand():
    # Orthogonal and equally long: w* = p, and d = (1 + c) g_0.
    assert_close(CAGrad(0.4)(torch.eye(2, dtype=torch.float64)), torch.tensor([0.7, 0.7], dtype=torch.float64))
    # Divided by 1 + c², 1.16.
    rescaled = CAGrad(0.4, rescale=True)(torch.eye(2, dtype=torch.float64))
    assert_close(rescaled, torch.tensor([0.7, 0.7], dtype=torch.float64) / 1.16)
    # c = 0 is the preferred sum.
    G = torch.tensor([[1.0, -1.0], [-1.0, 4.0]], dtype=torch.float64)
    assert_close(CAGrad(0.0, preference=[0.2, 0.8])(G), torch.tensor([0.2, 0.8], dtype=torch.float64))
    # One group: the ball's farthest point along g.
    assert_close(CAGrad(0.4)(torch.tensor([[9.0]])), torch.tensor([1.4]))


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_copies_of_one_gradient_step_along_it(K, c, seed):
    # g_0 = g, and every point of the hull is g: d = (1 + c) g.
    g = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    J = g.expand(K, 5)
    assert_close(J.T @ CAGrad(c)(gramian_of(J)), (1 + c) * g)


def test_opposite_gradients_leave_a_step_that_harms_neither():
    # g_1 = -g_2 and g_3 across both: 0 is in the hull, the paper divides by 0. The best in the ball harms none:
    # d along g_3, a third of it; g_0 = ((1 - 1) / 3, 1 / 3), so that it is g_0 already.
    J = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    d = J.T @ CAGrad(0.4)(gramian_of(J))
    assert_close(d[0], torch.zeros((), dtype=torch.float64))
    assert ((d - J.T @ mean(J)).norm() <= 0.4 / 3 + 1e-12).all()
    # All cancel: there is no ball.
    pair = J[:2]
    assert_close(pair.T @ CAGrad(0.4)(gramian_of(pair)), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("c", [0.6, 0.9])
def test_stationary_losses_get_no_long_weights(c):
    # g_1 = -g_2, g_3 = g_1 / 2: on the line of g_1 no step but 0 harms nobody, and 0 is not in the ball of c < 1
    # around g_0 = g_1 / 6, so that the best ends as near to 0 as the ball goes: d = (1 - c) g_1 / 6.
    J = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
    w = CAGrad(c)(gramian_of(J))
    assert_close(J.T @ w, (1 - c) / 6 * J[0])
    assert (w.abs() < 10).all()


def test_stationary_losses_with_room_for_no_harm_get_no_long_weights():
    # g_1 = (1, 0) = -g_2, g_3 = (1/2, sqrt(3)/2), g_0 = g_3 / 3. Without its share of g_1, 1/6 long, nobody is harmed,
    # and the ball of c = .9 reaches that far, .3: w = (1/3, 1/3 + 1/6, 1/3), or any like it with d = (0, sqrt(3)/6).
    G = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, -0.5], [0.5, -0.5, 1.0]], dtype=torch.float64)
    w = CAGrad(0.9)(G)
    assert (w.abs() < 1e6).all()
    assert_close(G @ w, torch.tensor([0.0, 0.0, 0.25], dtype=torch.float64))


@given(J=st.integers(2, 5).flatmap(lambda K: st.one_of(full_rank(K), conflicting(K))), c=RADII)
def test_agrees_with_torchjd(J, c):
    theirs = CAGradWeighting(c, norm_eps=0.0)(gramian_of(J))
    # Its interior-point solver stops at a gap of 1e-8, which leaves the weights half as many digits.
    assert_agrees(J, CAGrad(c)(gramian_of(J)), J.T @ theirs, tolerance=1e-3)


@pytest.mark.parametrize("c", [-0.1, 1.1, math.nan])
def test_a_radius_outside_the_unit_interval_is_refused(c):
    with pytest.raises(ValueError, match=r"`c` must be in \[0, 1\], got"):
        CAGrad(c)


def test_kinds_of_hyper_parameters():
    with pytest.raises(TypeError, match=r"`c` must be a number, got 'large'"):
        CAGrad("large")
    with pytest.raises(TypeError, match=r"`rescale` must be True or False, got 1"):
        CAGrad(rescale=1)
