from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import Bloop
from tests.oracles.agreement import assert_close_for, steps_from
from tests.oracles.bloop import Bloop as Paper
from tests.strategies import PUBLISHED, SCALES, gradients


@given(
    J=gradients(min_groups=2),
    scale=SCALES,
    lam=st.sampled_from([0.0, 0.1, 2.0]),
    rho=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_agrees_with_the_paper_on_raw_gradients(J, scale, lam, rho, seed, data):
    anchor = data.draw(st.integers(0, len(J) - 1), label="anchor")
    rule, paper = Bloop(lam, rho, anchor=anchor), Paper(lam, rho, anchor)
    for step in steps_from(J * scale, seed):
        assert_close_for(step, rule(step), paper(step))


@given(J=gradients(min_groups=2), scale=SCALES, seed=st.integers(0, 99))
def test_what_the_auxiliaries_add_is_orthogonal_to_the_average(J, scale, seed):
    rule, average = Bloop(1.0, 0.25), None
    for step in steps_from(J * scale, seed):
        average = step[0] if average is None else average + 0.25 * (step[0] - average)
        added = rule(step) - step[0]
        size = (average.norm() * step.norm(dim=1).sum()).clamp(min=1e-300)
        assert_close(added @ average / size, torch.zeros((), dtype=J.dtype))


@given(J=gradients(min_groups=2), scale=SCALES)
def test_at_the_first_call_the_anchor_loses_no_progress(J, scale):
    # m = g_a: <d, g_a> = |g_a|^2 whatever the auxiliaries want.
    J = J * scale
    size = (J[0].norm() * J.norm(dim=1).sum()).clamp(min=1e-300)
    assert_close(Bloop()(J) @ J[0] / size, J[0] @ J[0] / size)


def test_published_example():
    # m = g = row 1, a = row 2: a - (-22/18) m = (10, 20, 20)/9, and d = g + that / 10 = (-35, 11, 11)/9.
    J = PUBLISHED
    assert_close(Bloop(0.1)(J), torch.tensor([-35.0, 11.0, 11.0], dtype=torch.float64) / 9)


def test_the_average_by_hand():
    # m = (1, 0), then m = (1, 0) + .5 ((0, 1) - (1, 0)) = (.5, .5): a = (2, 0) loses (1, 1), and d = (0, 1) + (1, -1).
    rule = Bloop(1.0, 0.5)
    assert_close(rule(torch.tensor([[1.0, 0.0], [2.0, 3.0]])), torch.tensor([1.0, 3.0]))
    assert_close(rule(torch.tensor([[0.0, 1.0], [2.0, 0.0]])), torch.tensor([1.0, 0.0]))


def test_at_rho_one_the_average_is_the_present_gradient():
    rule = Bloop(1.0, 1.0)
    rule(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    assert_close(rule(torch.tensor([[0.0, 1.0], [2.0, 3.0]])), torch.tensor([2.0, 1.0]))


def test_exactly_parallel_auxiliaries_add_nothing():
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert_close(Bloop(1.0)(torch.stack([g, 3 * g, -7 * g])), g)


def test_a_zero_average_takes_nothing_away():
    assert_close(Bloop(0.5)(torch.tensor([[0.0, 0.0], [2.0, 4.0]])), torch.tensor([1.0, 2.0]))


def test_tiny_and_huge_averages_keep_their_direction():
    # <m, m> under- or overflows in float32; the quotient <m, a> / <m, m> does not.
    for unit in (1e-25, 1e25):
        d = Bloop(1.0)(unit * torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        assert_close(d / unit, torch.tensor([1.0, 3.0]))


def test_the_anchor_by_name():
    J = torch.randn(3, 5)
    assert torch.equal(Bloop(anchor="b")(J, ["a", "b", "c"]), Bloop(anchor=1)(J))
    with pytest.raises(ValueError, match=r"`anchor` must be one of 'a', 'b', 'c', got 'z'"):
        Bloop(anchor="z")(J, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"`names` must name the groups when the anchor is a name"):
        Bloop(anchor="a")(J)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lam", -1.0, r"`lam` must be finite and at least 0, got -1.0"),
        ("lam", math.inf, r"`lam` must be finite .*got inf"),
        ("rho", 1.5, r"`rho` must be in \[0, 1\], got 1.5"),
        ("rho", 0.0, r"`rho` must be in \(0, 1\], got 0.0"),
        ("rho", math.nan, r"`rho` must be in \[0, 1\], got nan"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        Bloop(**{name: value})
