from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import PCDWeighting

from gradalign.rules import PCD
from tests.oracles.agreement import assert_agrees, steps_from, well_posed
from tests.oracles.pcd import Paper
from tests.strategies import SCALES, gradients, gramian_of


@given(
    J=gradients(min_groups=2),
    scale=SCALES,
    tau=st.sampled_from([0.0, 0.02, 0.5]),
    beta=st.sampled_from([0.0, 0.9, 0.999]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_agrees_with_the_paper_on_raw_gradients(J, scale, tau, beta, seed, data):
    anchor = data.draw(st.integers(0, len(J) - 1), label="anchor")
    steps = steps_from(J, seed, count=3)
    # At the edge of feasibility, or where d~ all but vanishes, the answer jumps; G cannot tell the sides apart.
    assume(well_posed(lambda: Paper(tau, beta, anchor), steps))
    rule, paper = PCD(tau, beta, anchor=anchor), Paper(tau, beta, anchor)
    for step in (step * scale for step in steps):
        w = rule(gramian_of(step))
        assume(w.any())  # d~ is rounding of G, and 0 here; on raw gradients it may still have a direction
        assert_agrees(step, w, paper(step), tolerance=1e-7)  # what well_posed allows


@given(J=gradients(min_groups=2), seed=st.integers(0, 99))
def test_agrees_with_torchjd(J, seed):
    steps = steps_from(J, seed, count=3)
    assume(well_posed(Paper, steps, amplification=100))
    ours, theirs = PCD(), PCDWeighting(eps=0.0)
    for step in steps:
        G = gramian_of(step)
        # Repeated gradients may share a multiplier in another way: compare what the weights add up to. TorchJD takes a
        # share for given that is missed by up to 1e-9 of the largest square; relative to what is left where the shares
        # all but exclude each other that is far more.
        assert_agrees(step, ours(G), step.T @ theirs(G), tolerance=1e-5)


@given(J=gradients(min_groups=2), scale=SCALES, tau=st.sampled_from([0.0, 0.02, 0.5]))
def test_the_step_is_as_long_as_the_anchors_gradient_or_nothing(J, scale, tau):
    J = J * scale
    assume(well_posed(lambda: Paper(tau), [J]))
    w = PCD(tau)(gramian_of(J))
    length = (J.T @ w).norm()
    # What rounds are the terms of J'w, which may be far longer than what they leave.
    size = (w.abs() * J.norm(dim=1)).sum().clamp(min=1e-300)
    assert_close(length / size, torch.where(length > 0, J[0].norm(), 0.0) / size)


@given(J=gradients(min_groups=2, max_groups=2), scale=SCALES, tau=st.sampled_from([0.02, 0.5]))
def test_one_auxiliary_gets_its_share_of_progress(J, scale, tau):
    # With one auxiliary the constraint can always be met: <g~_2, d~> >= tau, and d is d~ times |g_1| / |d~|.
    J = J * scale
    G = gramian_of(J)
    assume(well_posed(lambda: Paper(tau), [J]))
    assume(bool((G.diagonal() > 0).all()))
    cos = G[0, 1] / (G[0, 0] * G[1, 1]).sqrt()
    mu = (tau - cos).clamp(min=0)
    length = (1 + 2 * mu * cos + mu**2).sqrt()
    assume(length > 1e-3)
    expected = torch.stack([1 / length, mu / length * (G[0, 0] / G[1, 1]).sqrt()])
    assert_close(PCD(tau)(G), expected)


def test_by_hand():
    # Units: g~_1 = (1, 0), g~_2 = (-.6, .8); tau = .5: mu = .5 + .6 = 1.1, d~ = (.34, .88), rescaled to |g_1| = 2.
    J = torch.tensor([[2.0, 0.0], [-3.0, 4.0]], dtype=torch.float64)
    d = torch.tensor([0.34, 0.88], dtype=torch.float64)
    assert_close(J.T @ PCD(0.5)(J @ J.T), 2 * d / d.norm())


def test_without_conflict_the_step_is_the_anchors():
    assert_close(PCD()(torch.eye(2)), torch.tensor([1.0, 0.02]) / math.sqrt(1 + 0.02**2))
    assert_close(PCD()(torch.tensor([[1.0, 0.5], [0.5, 1.0]])), torch.tensor([1.0, 0.0]))


def test_the_averages_by_hand():
    # Squares 1 then 9 at beta .5: (.5 * .5 * 1 + .5 * 9) / (1 - .25) = 19/3 for the auxiliary, 1 for the anchor.
    # cos-like <g~_1, g~_2> = 0, |g~_2|^2 = 27/19: mu = tau = .5, d~ = (1, .5 sqrt(27/19)).
    rule = PCD(0.5, 0.5)
    rule(torch.eye(2, dtype=torch.float64))
    w = rule(torch.diag(torch.tensor([1.0, 9.0], dtype=torch.float64)))
    length = math.sqrt(1 + 0.25 * 27 / 19)
    assert_close(w, torch.tensor([1.0, 0.5 * math.sqrt(3 / 19)], dtype=torch.float64) / length)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_opposite_auxiliaries_cannot_both_progress(scale):
    # <g, d> >= tau |g|^2 and <-g, d> >= tau |g|^2 exclude each other: the anchor's gradient alone.
    J = scale * torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [0.0, -1.0, -1.0]], dtype=torch.float64)
    assert_close(PCD()(J @ J.T), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    # At tau = 0 they only forbid to move along them: what is left of (1, 2, 0) is (1, 1, -1), of length sqrt(3).
    d = scale * math.sqrt(5 / 3) * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    assert_close(J.T @ PCD(0.0)(J @ J.T) / scale, d / scale)


def test_an_opposite_auxiliary_turns_the_step_around():
    # g~_1 = 1, g~_2 = -1 on a line: d~ = -tau, as long as g_1, so d = -g_1.
    J = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    assert_close(J.T @ PCD()(J @ J.T), torch.tensor([-2.0], dtype=torch.float64))


def test_an_opposite_auxiliary_at_tau_zero_leaves_nothing():
    J = torch.tensor([[2.0, 1.0], [-4.0, -2.0]], dtype=torch.float64)
    assert_close(J.T @ PCD(0.0)(J @ J.T), torch.zeros(2, dtype=torch.float64))


def test_repeated_auxiliaries_count_once():
    J = torch.tensor([[2.0, 0.0], [-3.0, 4.0], [-3.0, 4.0]], dtype=torch.float64)
    d = torch.tensor([0.34, 0.88], dtype=torch.float64)
    assert_close(J.T @ PCD(0.5)(J @ J.T), 2 * d / d.norm())


def test_zero_gradients():
    # A zero anchor: no step. A zero auxiliary asks for nothing.
    assert not PCD()(torch.diag(torch.tensor([0.0, 1.0]))).any()
    assert PCD()(torch.diag(torch.tensor([4.0, 0.0]))).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tau", -0.1, r"`tau` must be in \[0, 1\], got -0.1"),
        ("tau", 1.1, r"`tau` must be in \[0, 1\], got 1.1"),
        ("beta", 1.0, r"`beta` must be in \[0, 1\), got 1.0"),
        ("beta", math.nan, r"`beta` must be in \[0, 1\], got nan"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        PCD(**{name: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_that_exclude_one_another_in_one_dimension_leave_the_anchor(dtype):
    # <h_2, e> >= tau and <h_3, e> >= tau with h_2 = -h_3: in float32 G is off by enough to meet them with weights of
    # 1e5, which add up to rounding.
    J = torch.tensor([[0.2712765], [-1.2729183], [0.5026970]], dtype=dtype)
    assert_close(PCD()(J @ J.T), torch.tensor([1.0, 0.0, 0.0], dtype=dtype))


def test_shares_that_can_just_be_had_are():
    # h_2 = (0, 1, t), h_3 = (0, -1, t): e = (1, 0, tau (1 + t^2) / t), with weights of tau / t^2.
    t = 1e-4
    J = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, t], [0.0, -1.0, t]], dtype=torch.float64)
    e = torch.tensor([1.0, 0.0, 0.02 * math.sqrt(1 + t * t) / t], dtype=torch.float64)
    assert_close(J.T @ PCD()(gramian_of(J)), e / e.norm(), rtol=1e-6, atol=1e-6)  # 1e-16 of G, times weights of 1e8


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_direction_that_vanishes_is_no_direction(scale):
    # tau = 0 against an opposite auxiliary: e = g_a + g_k = 0, by rounding only nearly.
    for g in torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale:
        assert not PCD(tau=0.0)(gramian_of(torch.stack([g, -0.3 * g]))).any()
