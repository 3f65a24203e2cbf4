from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import GradVacWeighting

from gradalign.rules import GradVac, PCGrad
from tests.oracles import gradvac
from tests.oracles.agreement import assert_agrees, steps_from
from tests.oracles.cases_symmetric import gradvac_steps
from tests.strategies import PUBLISHED, SCALES, badly_scaled, conflicting, full_rank, gradients, gramian_of

CLEAR = st.integers(2, 5).flatmap(lambda K: st.one_of(full_rank(K), conflicting(K), badly_scaled(K)))


def target_after(rule):
    (memory,) = rule.state_dict()["memory"].values()
    return memory["targets"]


@given(J=CLEAR, scale=SCALES, seed=st.integers(0, 999), beta=st.floats(0, 1))
def test_agrees_with_the_paper_on_raw_gradients_over_steps(J, scale, seed, beta):
    steps = steps_from(J * scale, seed, count=4)
    ours, paper = gradvac_steps(steps, seed, beta)
    # A target near 1 divides by its sine, and a gradient that all but vanished has lost digits that G does not hold.
    assert_close(ours / steps[-1].norm(dim=1).sum(), paper / steps[-1].norm(dim=1).sum(), rtol=1e-6, atol=1e-7)


@given(J=gradients(min_groups=2), scale=SCALES, seed=st.integers(0, 999))
def test_the_first_call_agrees_on_every_kind_of_gradients(J, scale, seed):
    J = J * scale
    G = gramian_of(J)
    orders = GradVac(seed=seed)._orders(G).tolist()
    # A gradient that opposite ones took away is known from G up to the root of its rounding.
    assert_agrees(J, GradVac(seed=seed)(G), gradvac.aligned_gradients([J], [orders], 0.5)[0], tolerance=2e-7)


@given(J=CLEAR, seed=st.integers(0, 999))
def test_the_first_call_is_pcgrad(J, seed):
    G = gramian_of(J)
    assert_agrees(J, GradVac(seed=seed)(G), J.T @ PCGrad(seed=seed)(G))


def test_published_example():
    # The first call: PCGrad's (20/9, 30/19).
    J = PUBLISHED
    assert_close(GradVac()(gramian_of(J)), torch.tensor([20 / 9, 30 / 19], dtype=torch.float64))


def test_two_calls_by_hand():
    # cos -.6, unit norms. First: targets 0, the step is .6 each; then the targets are -.3.
    # Second: the step is (-.3 * .8 + .6 sqrt(.91)) / sqrt(.91) = .6 - .24 / sqrt(.91); then the targets are -.45.
    G = torch.tensor([[1.0, -0.6], [-0.6, 1.0]], dtype=torch.float64)
    rule = GradVac()
    assert_close(rule(G), torch.full((2,), 1.6, dtype=torch.float64))
    assert_close(target_after(rule)[0, 1], torch.tensor(-0.3, dtype=torch.float64))
    assert_close(rule(G), torch.full((2,), 1.6 - 0.24 / 0.91**0.5, dtype=torch.float64))
    assert_close(target_after(rule)[1, 0], torch.tensor(-0.45, dtype=torch.float64))


def test_targets_move_where_nothing_is_altered_too():
    # cos .6 twice over: no step, targets .3. Then orthogonal gradients are not similar enough: the step is
    # .3 / sqrt(.91) each.
    rule = GradVac()
    friendly = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    assert_close(rule(friendly), torch.ones(2, dtype=torch.float64))
    assert_close(rule(torch.eye(2, dtype=torch.float64)), torch.full((2,), 1 + 0.3 / 0.91**0.5, dtype=torch.float64))


@given(J=full_rank(2), seed=st.integers(0, 999))
def test_an_altered_gradient_has_the_target_as_its_cosine(J, seed):
    steps = steps_from(J, seed, count=4)
    rule = GradVac()
    for step in steps[:-1]:
        rule(gramian_of(step))
    targets = target_after(rule).clone()
    J = steps[-1]
    w = rule(gramian_of(J))
    # With two groups w = (1 + step of g_2, 1 + step of g_1).
    for i, j in ((0, 1), (1, 0)):
        altered = J[i] + (w[j] - 1) * J[j]
        cosine = altered @ J[j] / altered.norm() / J[j].norm()
        before = J[i] @ J[j] / J[i].norm() / J[j].norm()
        assert_close(cosine, torch.maximum(before, targets[i, j]), rtol=0, atol=1e-6)


@given(J=full_rank(2), seed=st.integers(0, 999), beta=st.floats(0, 0.9))
def test_agrees_with_torchjd_where_the_order_is_no_choice(J, seed, beta):
    ours, theirs = GradVac(beta), GradVacWeighting(beta, eps=0.0)
    for step in steps_from(J, seed, count=4):
        G = gramian_of(step)
        # Both work on G; the sine of nearly parallel gradients keeps half of its digits.
        assert_close(ours(G), theirs(G), rtol=1e-6, atol=1e-7)


def test_zero_gradients_are_passed_over_and_their_targets_kept():
    rule = GradVac()
    friendly = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    rule(friendly)
    gone = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(rule(gone), torch.ones(2, dtype=torch.float64))
    expected = torch.tensor([[0.0, 0.3], [0.3, 0.0]], dtype=torch.float64)
    assert_close(target_after(rule), expected)


def test_opposite_gradients_vanish():
    # cos -1: the step is norm(g_i) / norm(g_j), and nothing is left of either.
    J = torch.tensor([[1.0, 2.0], [-3.0, -6.0]], dtype=torch.float64)
    assert_close(J.T @ GradVac()(gramian_of(J)), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_a_target_of_one_takes_a_finite_step(beta):
    # Parallel gradients make it; the formula then divides by 0.
    rule = GradVac(beta)
    for _ in range(60):
        rule(torch.ones(2, 2, dtype=torch.float64))
    assert rule(torch.eye(2, dtype=torch.float64)).isfinite().all()


def test_bad_beta_is_refused():
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\], got 1.5"):
        GradVac(1.5)
    with pytest.raises(TypeError, match=r"`beta` must be a number, got 'half'"):
        GradVac("half")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_target_of_one_gives_a_finite_step(dtype):
    rule = GradVac(beta=1.0)
    rule(torch.ones(2, 2, dtype=dtype))  # parallel: the targets are 1
    w = rule(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=dtype))
    assert w.isfinite().all()
    if dtype == torch.float64:
        # c_2 = (t sqrt(.75) - .5 s) / s with s = sqrt(1 - t^2), t = 1 - 1e-8; s^2 = 2e-8 (1 - 5e-9).
        s = math.sqrt(2e-8 * (1 - 5e-9))
        assert_close(
            w, torch.full((2,), 1 + ((1 - 1e-8) * math.sqrt(0.75) - 0.5 * s) / s, dtype=dtype), rtol=1e-7, atol=0
        )


def test_what_rounding_leaves_of_a_gradient_has_no_cosine():
    # g and -g take each other away; what is left of g has no angle with h, whose target has to stay.
    g = torch.tensor([-2.0, 3.0, 1.0], dtype=torch.float64) / 7
    h = torch.tensor([-1.0, 9.0, -8.0], dtype=torch.float64) / 3
    for seed in range(8):
        rule = GradVac(seed=seed)
        G = gramian_of(torch.stack([g, -g, h]))
        first = GradVac(seed=seed)._orders(G)[0, 0]  # whom group 0 meets first
        rule(G)
        if first == 1:
            assert target_after(rule)[0, 2] == 0
