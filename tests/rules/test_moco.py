from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import MoCo, MoDo
from tests.oracles.agreement import assert_close_for, steps_from
from tests.oracles.moco import MoCo as Paper
from tests.strategies import SCALES, full_rank, gradients

PAIR = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)


@given(
    J=gradients(),
    scale=SCALES,
    beta=st.sampled_from([0.1, 0.5, 1.0]),
    gamma=st.sampled_from([0.01, 0.1, 1.0]),
    rho=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_paper_on_raw_gradients(J, scale, beta, gamma, rho, seed):
    rule, paper = MoCo(beta, gamma, rho), Paper(beta, gamma, rho)
    for step in steps_from(J * scale, seed):
        assert_close_for(step, rule(step), paper(step))


@given(J=st.integers(1, 6).flatmap(full_rank), seed=st.integers(0, 99))
def test_agrees_with_the_paper_in_absolute_terms(J, seed):
    rule, paper = MoCo(0.5, 0.01, relative=False), Paper(0.5, 0.01, relative=False)
    for step in steps_from(J, seed):
        assert_close_for(step, rule(step), paper(step))


@given(J=gradients(), scale=SCALES, seed=st.integers(0, 99))
def test_without_tracking_it_is_modo_on_one_batch(J, scale, seed):
    # beta = 1: y = g.
    one, two = MoCo(1.0, 0.3), MoDo(0.3)
    for step in steps_from(J * scale, seed):
        assert_close_for(step, one(step), step.T @ two(step @ step.T))


def test_one_step_by_hand():
    # G = diag(1, 3), relative diag(.5, 1.5): (.5, .5) - .5 (.25, .75) = (.375, .125), on the simplex (.625, .375).
    d = MoCo(gamma=0.5)(torch.tensor([[1.0, 0.0], [0.0, math.sqrt(3.0)]]))
    assert_close(d, torch.tensor([0.625, 0.375 * math.sqrt(3.0)]))


def test_the_tracked_gradients_by_hand():
    # gamma = 0 keeps equal weights: d is the mean of y. y = (2, 0), then 2 + .25 (4 - 2) = 2.5 and 0 + .25 (-4) = -1.
    rule = MoCo(0.25, 0.0)
    assert_close(rule(torch.tensor([[2.0], [0.0]])), torch.tensor([1.0]))
    assert_close(rule(torch.tensor([[4.0], [-4.0]])), torch.tensor([0.75]))


def test_many_steps_on_one_point_reach_the_least_norm_combination():
    # MGDA: .6 g_1 + .4 g_2 = (0, 1, 1).
    rule = MoCo(gamma=0.5)
    for _ in range(100):
        d = rule(PAIR)
    assert_close(d, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))


def test_noise_is_averaged_out():
    # g_1 = e_1 + noise, g_2 = -e_1 + 2 e_2 + noise, at gamma = 0: d tends to the mean of the true gradients, e_2.
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([[1.0, 0.0], [-1.0, 2.0]])
    rule = MoCo(0.01, 0.0)
    for _ in range(600):
        d = rule(true + torch.randn(2, 2, generator=generator))
    # The tracked noise has variance .01 / (2 - .01) a row: standard error .05 of the mean of two; five are allowed.
    assert ((d - torch.tensor([0.0, 1.0])).abs() < 0.25).all()


def test_zero_gradients_give_a_zero_step():
    assert not MoCo()(torch.zeros(3, 4)).any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", 1.5, r"`beta` must be in .*got 1.5"),
        ("beta", 0.0, r"`beta` must be in \(0, 1\], got 0.0"),
        ("gamma", -1.0, r"`gamma` must be finite .*got -1.0"),
        ("rho", math.nan, r"`rho` must be finite and at least 0, got nan"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        MoCo(**{name: value})


def test_a_switch_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"`relative` must be True or False, got None"):
        MoCo(relative=None)
