from __future__ import annotations

import torch
from hypothesis import assume, given
from torch.testing import assert_close
from torchjd.aggregation import MGDAWeighting

from gradalign.rules import MGDA
from tests.oracles import mgda
from tests.strategies import PUBLISHED, SCALES, conflicting, full_rank, gradients, gramian_of


@given(J=gradients(), scale=SCALES)
def test_agrees_with_the_least_norm_in_the_hull_of_raw_gradients(J, scale):
    J = J * scale
    d = J.T @ MGDA()(gramian_of(J))
    shortest = J.norm(dim=1).min().clamp(min=1e-300)  # d is no longer than that
    # A least norm near 0 is known from G up to the root of its rounding.
    assert_close(d / shortest, mgda.aligned_gradient(J) / shortest, rtol=0, atol=1e-7)


@given(J=gradients(), scale=SCALES)
def test_every_gradient_has_the_square_of_the_least_norm_along_d(J, scale):
    J = J * scale
    w = MGDA()(gramian_of(J))
    d = J.T @ w
    assert (w >= 0).all()
    assert_close(w.sum(), torch.ones_like(w.sum()))
    sizes = J.norm(dim=1) * (w @ J.norm(dim=1))
    assert (J @ d - d @ d >= -1e-12 * sizes).all()


def test_published_example_and_the_closed_form_of_two():
    assert_close(MGDA()(gramian_of(PUBLISHED)), torch.tensor([0.6, 0.4], dtype=torch.float64))
    # w_1 = clip((G_22 - G_12) / (G_11 + G_22 - 2 G_12), 0, 1): 5 / 7, (4 - 3) / (9 + 4 - 6), and -1 / 3 clipped.
    for G, first in (
        ([[1.0, -1.0], [-1.0, 4.0]], 5 / 7),
        ([[9.0, 3.0], [3.0, 4.0]], 1 / 7),
        ([[9.0, 5.0], [5.0, 4.0]], 0.0),
    ):
        w = MGDA()(torch.tensor(G, dtype=torch.float64))
        assert_close(w, torch.tensor([first, 1 - first], dtype=torch.float64))


def test_a_zero_gradient_stops_the_step_and_opposite_gradients_cancel():
    J = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]], dtype=torch.float64)
    assert_close(J.T @ MGDA()(gramian_of(J)), torch.zeros(2, dtype=torch.float64))
    w = MGDA()(gramian_of(torch.tensor([[1.0, 2.0], [-2.0, -4.0]], dtype=torch.float64)))
    assert_close(w, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))


def test_exactly_parallel_gradients_give_the_shorter():
    J = torch.tensor([[3.0, 6.0], [1.0, 2.0]], dtype=torch.float64)
    assert_close(J.T @ MGDA()(gramian_of(J)), J[1])


@given(J=full_rank(3) | conflicting(3))
def test_agrees_with_torchjd(J):
    # TorchJD's Frank-Wolfe takes its best step of each iteration; the gap falls as 1/iterations at worst.
    G = gramian_of(J)
    assume(torch.linalg.cond(G) < 1e3)
    w = MGDAWeighting(epsilon=1e-9, max_iters=20000)(G)
    assert_close(w @ G @ w, MGDA()(G) @ G @ MGDA()(G), rtol=0, atol=1e-3 * float(G.trace()))
    assert MGDA()(G) @ G @ MGDA()(G) <= (w @ G @ w) * (1 + 1e-12)
