from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import OLAux
from tests.oracles.agreement import assert_agrees, steps_from
from tests.oracles.olaux import OLAux as Paper
from tests.strategies import SCALES, gradients, gramian_of


@pytest.mark.parametrize("relative", [False, True])
@given(J=gradients(min_groups=2), scale=SCALES, horizon=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_agrees_with_the_paper_on_raw_gradients(relative, J, scale, horizon, seed, data):
    anchor = data.draw(st.integers(0, len(J) - 1), label="anchor")
    rule = OLAux(0.5, horizon, 2.0, relative=relative, anchor=anchor)
    paper = Paper(0.5, horizon, 2.0, relative=relative, anchor=anchor)
    for step in steps_from(J * scale, seed):
        assert_agrees(step, rule(gramian_of(step)), paper(step))


@given(J=gradients(min_groups=2), scale=SCALES, horizon=st.integers(1, 3), seed=st.integers(0, 99))
def test_lags_one_change_behind_by_the_papers_own_order(J, scale, horizon, seed):
    # The paper steps and then changes the weights; here the step that completes a sum has the new ones. Between the
    # changes, horizon - 1 calls of each horizon, the two agree.
    steps = steps_from(J * scale, seed)
    rule, paper = OLAux(0.5, horizon), Paper(0.5, horizon, 1.0, relative=True, early=False)
    for call, step in enumerate(steps, start=1):
        w, expected = rule(gramian_of(step)), paper(step)
        if call % horizon:
            assert_agrees(step, w, expected)


def test_by_hand():
    # Sums of <g_a, g_k>: 2, then 2 - 1 = 1: at the second call w = 1 + .1 * 1 = 1.1. At the fourth 1.1 - .1 * 2 = .9.
    friendly, hostile = torch.tensor([[1.0, 2.0], [2.0, 9.0]]), torch.tensor([[1.0, -1.0], [-1.0, 9.0]])
    rule = OLAux(0.1, 2, relative=False)
    weights = [rule(G)[1].item() for G in (friendly, hostile, hostile, hostile, friendly)]
    assert weights == pytest.approx([1.0, 1.1, 1.1, 0.9, 0.9])


def test_relative_products_are_in_units_of_each_calls_anchor():
    # 2/1, then 8/16: 1 + .1 * 2.5.
    rule = OLAux(0.1, 2)
    rule(torch.tensor([[1.0, 2.0], [2.0, 9.0]]))
    assert_close(rule(torch.tensor([[16.0, 8.0], [8.0, 9.0]])), torch.tensor([1.0, 1.25]))


def test_absolute_and_relative_agree_where_the_anchor_has_unit_length():
    G = torch.tensor([[1.0, -0.5, 0.25], [-0.5, 2.0, 0.0], [0.25, 0.0, 3.0]])
    one, two = OLAux(horizon=1), OLAux(horizon=1, relative=False)
    for _ in range(3):
        assert_close(one(G), two(G))


@given(J=gradients(min_groups=2), scale=SCALES)
def test_the_anchor_keeps_its_weight(J, scale):
    rule = OLAux(horizon=1)
    for _ in range(3):
        assert rule(gramian_of(J * scale))[0] == 1


def test_a_zero_anchor_teaches_nothing():
    rule = OLAux(horizon=1, initial=0.5)
    assert_close(rule(torch.diag(torch.tensor([0.0, 4.0]))), torch.tensor([1.0, 0.5]))


def test_a_nan_among_the_calls_is_not_counted():
    # The broken call enters no sum and completes no horizon.
    G, broken = torch.tensor([[1.0, 2.0], [2.0, 9.0]]), torch.full((2, 2), math.nan)
    rule, other = OLAux(0.1, 2), OLAux(0.1, 2)
    rule(G), other(G)
    assert rule(broken).isnan().all()
    assert torch.equal(rule(G), other(G))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rate", -1.0, r"`rate` must be finite and at least 0, got -1.0"),
        ("rate", math.inf, r"`rate` must be finite .*got inf"),
        ("horizon", 0, r"`horizon` must be .*got 0"),
        ("initial", math.nan, r"`initial` must be finite.*got nan"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        OLAux(**{name: value})


def test_hyper_parameters_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"`horizon` must be an integer, got 1.5"):
        OLAux(horizon=1.5)
    with pytest.raises(TypeError, match=r"`relative` must be True or False, got 'no'"):
        OLAux(relative="no")
