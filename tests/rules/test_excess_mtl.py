from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import ExcessMTL as Peer

from gradalign.rules import ExcessMTL
from tests.oracles.agreement import assert_close_for, steps_from
from tests.oracles.excess_mtl import ExcessMTL as Paper
from tests.strategies import SCALES, full_rank, gradients


@given(J=gradients(), scale=SCALES, lr=st.sampled_from([0.0, 0.1, 1.0, 50.0]), seed=st.integers(0, 99))
def test_agrees_with_the_paper_on_raw_gradients(J, scale, lr, seed):
    rule, paper = ExcessMTL(lr), Paper(lr)
    for step in steps_from(J * scale, seed):
        assert_close_for(step, rule(step), paper(step))


@given(J=gradients(), scale=SCALES)
def test_the_first_call_is_the_mean(J, scale):
    # Each excess risk is its own baseline: every ratio is 1. A zero gradient's is 0, and counts for less.
    J = J * scale
    if (J != 0).any(1).all():
        assert_close_for(J, ExcessMTL()(J), J.mean(0))


@given(J=st.integers(1, 6).flatmap(full_rank), seed=st.integers(0, 99))
def test_agrees_with_torchjd_after_a_warm_up_of_one_call(J, seed):
    # TorchJD takes the first call's risk raw, in squared units; with a warm-up of one call it returns the mean there
    # and sets the baseline, but does not move the weights: here the first call multiplies all of them by e, which
    # is the same. It adds 1e-7 to S and to the baseline: up to a part in 1e4 at entries of order .01.
    ours, theirs = ExcessMTL(), Peer(n_warmup_steps=1)
    for step in steps_from(J, seed):
        assert_close(ours(step), theirs(step), rtol=1e-3, atol=1e-3)


def test_by_hand():
    # First S = (4), (1) and E = 2, 1. Then g = 2, 3: S = 8, 10, E = 4/sqrt(8), 9/sqrt(10), ratios sqrt(.5) and
    # 9/sqrt(10): w_2/w_1 = exp(9/sqrt(10) - sqrt(.5)).
    rule = ExcessMTL()
    assert_close(rule(torch.tensor([[2.0], [1.0]])), torch.tensor([1.5]))
    odds = math.exp(9 / math.sqrt(10) - math.sqrt(0.5))
    assert_close(rule(torch.tensor([[2.0], [3.0]])), torch.tensor([(2 + 3 * odds) / (1 + odds)]))


def test_a_group_that_was_zero_at_first_keeps_the_ratio_zero():
    # Its baseline is 0, and 0/0 = 0 as anything/0 = 0 here: w_2/w_1 = exp(-1), then exp(-1 - sqrt(.5)).
    rule = ExcessMTL()
    rule(torch.tensor([[2.0], [0.0]]))
    odds = math.exp(-1 - math.sqrt(0.5))
    assert_close(rule(torch.tensor([[2.0], [8.0]])), torch.tensor([(2 + 8 * odds) / (1 + odds)]))


def test_a_huge_ratio_saturates():
    # exp of a ratio of about 1e18 overflows; the weights are 0 and 1.
    rule = ExcessMTL()
    rule(torch.tensor([[1.0], [1e-18]], dtype=torch.float64))
    for _ in range(3):
        d = rule(torch.tensor([[1.0], [1.0]], dtype=torch.float64))
        assert_close(d, torch.tensor([1.0], dtype=torch.float64))


@given(J=gradients(), scale=SCALES, seed=st.integers(0, 99))
def test_d_is_a_convex_combination(J, scale, seed):
    rule = ExcessMTL()
    for step in steps_from(J * scale, seed):
        d = rule(step)
        rounding = 1e-12 * step.abs().amax(0)
        assert ((d >= step.amin(0) - rounding) & (d <= step.amax(0) + rounding)).all()


@pytest.mark.parametrize("lr", [-1.0, math.inf, math.nan])
def test_a_learning_rate_out_of_range_is_refused(lr):
    with pytest.raises(ValueError, match=r"`lr` must be finite and at least 0, got"):
        ExcessMTL(lr)


def test_a_learning_rate_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"`lr` must be a number, got 'x'"):
        ExcessMTL("x")
