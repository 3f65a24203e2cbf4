from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import MoDoWeighting

from gradalign.rules import MoDo
from tests.oracles.agreement import assert_close_for, steps_from
from tests.oracles.modo import MoDo as Paper
from tests.oracles.modo import project_on_simplex, stepped_batch
from tests.strategies import PUBLISHED, SCALES, full_rank, gradients, gramian_of


@given(
    J=gradients(),
    scale=SCALES,
    gamma=st.sampled_from([0.01, 0.1, 1.0]),
    rho=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_paper_on_raw_gradients(J, scale, gamma, rho, seed):
    rule, paper = MoDo(gamma, rho), Paper(gamma, rho)
    for step in steps_from(J * scale, seed):
        assert_close_for(step, step.T @ rule(gramian_of(step)), paper(step))


@given(J=st.integers(1, 6).flatmap(full_rank), seed=st.integers(0, 99))
def test_agrees_with_the_paper_in_absolute_terms(J, seed):
    rule, paper = MoDo(0.01, relative=False), Paper(0.01, relative=False)
    for step in steps_from(J, seed):
        assert_close_for(step, step.T @ rule(gramian_of(step)), paper(step))


@pytest.mark.parametrize("batches", [2, 3])
@pytest.mark.parametrize("relative", [False, True])
@given(data=st.data(), seed=st.integers(0, 99))
def test_agrees_with_the_paper_on_independent_batches(batches, relative, data, seed):
    # Batches that agree, as those of one training set do: a mean diagonal near zero would be no unit.
    K = data.draw(st.integers(1, 3), label="K")
    part = data.draw(full_rank(K), label="J")
    rule = MoDo(0.05, batches=batches, relative=relative)
    paper = Paper(0.05, batches=batches, relative=relative)
    for number in range(3):
        step = torch.cat(steps_from(part, seed + 100 * number, count=batches + 1)[-batches:])
        assert_close_for(step, step.T @ rule(gramian_of(step)), paper(step))


@given(J=gradients(), scale=SCALES)
def test_the_weights_are_on_the_simplex(J, scale):
    w = MoDo(1.0)(gramian_of(J * scale))
    assert (w >= 0).all()
    assert_close(w.sum(), torch.ones_like(w.sum()))


@given(J=gradients(), scale=SCALES)
def test_steps_far_too_long_end_on_the_simplex_too(J, scale):
    w = MoDo(1.0, relative=False)(gramian_of(J * scale))
    assert (w >= 0).all()
    assert_close(w.sum(), torch.ones_like(w.sum()))


@pytest.mark.parametrize(("gamma", "relative"), [(0.5, True), (0.25, False)])
def test_one_step_by_hand(gamma, relative):
    # Mean diagonal 2: A (.5, .5) = (.25, .75) relative to it, (.5, 1.5) not. (.5, .5) - (.125, .375) = (.375, .125),
    # which lacks .5 of the simplex: (.625, .375).
    G = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert_close(MoDo(gamma, relative=relative)(G), torch.tensor([0.625, 0.375]))


def test_the_next_step_starts_from_the_last_weights_and_rho_pulls_back():
    # A (.625, .375) = (.3125, .5625): less .5 times that (.46875, .09375), and .21875 more each: (.6875, .3125).
    # rho = .5 takes .25 (.625, .375) = (.15625, .09375) away besides: (.3125, 0), and .34375 more: (.65625, .34375).
    G = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    plain, pulled = MoDo(0.5), MoDo(0.5, 0.5)
    plain(G)
    assert_close(pulled(G), torch.tensor([0.625, 0.375]))  # from equal weights rho shifts both alike
    assert_close(plain(G), torch.tensor([0.6875, 0.3125]))
    assert_close(pulled(G), torch.tensor([0.65625, 0.34375]))


def test_many_steps_reach_the_least_norm_combination():
    J = PUBLISHED
    rule = MoDo(0.5)
    for _ in range(100):
        w = rule(J @ J.T)
    assert_close(w, torch.tensor([0.6, 0.4], dtype=torch.float64))


@pytest.mark.parametrize("batches", [1, 2, 3])
@given(data=st.data(), seed=st.integers(0, 99))
def test_agrees_with_torchjd(batches, data, seed):
    K = data.draw(st.integers(1, 3), label="K")
    J = data.draw(full_rank(batches * K), label="J")
    ours, theirs = MoDo(0.01, 0.1, batches=batches, relative=False), MoDoWeighting(0.01, 0.1)
    for step in steps_from(J, seed, count=3):
        parts = step.split(K)
        w = theirs(parts[0] @ parts[min(1, batches - 1)].T)
        assert_close(step.T @ ours(gramian_of(step)), stepped_batch(parts).T @ w)


def test_the_transcription_of_the_projection_is_the_nearest_point():
    # (.9, .4, -1): the support is the first two, tau = .15.
    v = torch.tensor([0.9, 0.4, -1.0], dtype=torch.float64)
    assert_close(project_on_simplex(v), torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64))


def test_zero_gradients_leave_the_weights_where_they_were():
    assert_close(MoDo()(torch.zeros(2, 2)), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gamma", -1.0, r"`gamma` must be finite .*got -1.0"),
        ("gamma", math.nan, r"`gamma` must be finite .*got nan"),
        ("rho", -1.0, r"`rho` must be finite and at least 0, got -1.0"),
        ("batches", 0, r"`batches` must be .*got 0"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        MoDo(**{name: value})


def test_a_switch_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"`relative` must be True or False, got 0"):
        MoDo(relative=0)


def test_batches_that_do_not_divide_the_groups_are_refused():
    with pytest.raises(ValueError, match=r"got 4"):
        MoDo(batches=3)(torch.eye(4))
