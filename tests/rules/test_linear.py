from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradalign.rules import Constant, Mean, Sum
from tests.oracles.agreement import assert_agrees
from tests.oracles.linear import gradient_mean, gradient_sum, weighted_sum
from tests.strategies import SCALES, gradients, gramian_of


@given(J=gradients(), scale=SCALES, data=st.data())
def test_agree_with_sums_of_raw_gradients(J, scale, data):
    J = J * scale
    G = gramian_of(J)
    weights = data.draw(st.lists(st.floats(-10, 10), min_size=len(J), max_size=len(J)), label="weights")
    assert_agrees(J, Sum()(G), gradient_sum(J))
    assert_agrees(J, Mean()(G), gradient_mean(J))
    assert_agrees(J, Constant(weights)(G), weighted_sum(J, weights))


@given(J=gradients(), scale=SCALES)
def test_the_mean_is_no_longer_than_the_longest_gradient(J, scale):
    J = J * scale
    assert (J.T @ Mean()(gramian_of(J))).norm() <= J.norm(dim=1).max() * (1 + 1e-14)


def test_weights():
    G = torch.tensor([[1.0, -2.0], [-2.0, 9.0]])
    assert Sum()(G).tolist() == [1.0, 1.0]
    assert Mean()(G).tolist() == [0.5, 0.5]
    assert Constant([0.25, -2])(G).tolist() == [0.25, -2.0]
    assert Constant(torch.tensor([0.25, 0.5]))(G.expand(3, 2, 2)).tolist() == [[0.25, 0.5]] * 3


def test_constant_keeps_its_own_copy():
    weights = [0.5, 0.5]
    rule = Constant(weights)
    weights[0] = 7.0
    assert rule.weights == (0.5, 0.5)


def test_constant_refuses_what_is_no_weights():
    with pytest.raises(TypeError, match=r"`weights` must be a sequence of numbers, got 0.5"):
        Constant(0.5)
    with pytest.raises(TypeError, match=r"`weights` must be a sequence of numbers, got 'ab'"):
        Constant("ab")
    with pytest.raises(ValueError, match=r"`weights` must hold one number for each loss group, got none"):
        Constant([])
    with pytest.raises(ValueError, match=r"`weights\[1\]` must be finite, got nan"):
        Constant([1.0, math.nan])
    with pytest.raises(TypeError, match=r"`weights\[0\]` must be a number, got None"):
        Constant([None])
    with pytest.raises(
        ValueError, match=r"`weights` must hold one number for each of the 3 loss groups \('a', 'b', 'c'\), got 2"
    ):
        Constant([1, 2])(torch.eye(3), ["a", "b", "c"])
