from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import RandomWeights
from tests.oracles.agreement import assert_agrees
from tests.oracles.weightings import random_weighting
from tests.strategies import SCALES, gradients, gramian_of


@given(J=gradients(), scale=SCALES, seed=st.integers(0, 999))
def test_agrees_with_the_paper_on_raw_gradients(J, scale, seed):
    J = J * scale
    normals = torch.randn(len(J), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_agrees(J, RandomWeights(seed=seed)(gramian_of(J)), random_weighting(J, normals.tolist()))


def test_the_logarithms_are_normal():
    # log w_i - log w_j is the difference of two standard normals: mean 0, variance 2. Standard errors over 20,000
    # blocks: sqrt(2 / n) = .01 and 2 sqrt(2 / n) = .02; five of them are allowed.
    logs = RandomWeights(seed=3)(torch.eye(3, dtype=torch.float64).expand(20_000, 3, 3)).log()
    for i, j in ((0, 1), (1, 2), (0, 2)):
        difference = logs[:, i] - logs[:, j]
        assert abs(difference.mean()) < 0.05
        assert abs(difference.var() - 2) < 0.1


@given(J=gradients(min_groups=2), scale=SCALES)
def test_the_weights_are_inside_the_simplex_and_ask_nothing_of_the_gradients(J, scale):
    w = RandomWeights(seed=5)(gramian_of(J * scale))
    assert (w > 0).all()
    assert_close(w.sum(), torch.ones_like(w.sum()))
    assert_close(w, RandomWeights(seed=5)(torch.eye(len(J), dtype=torch.float64)))


def test_each_block_and_each_call_draws_anew():
    rule = RandomWeights(seed=1)
    w = rule(torch.eye(3).expand(4, 3, 3))
    again = rule(torch.eye(3).expand(4, 3, 3))
    assert len({tuple(row.tolist()) for row in torch.cat([w, again])}) == 8


def test_equal_seeds_draw_alike_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    one, two, other = RandomWeights(seed=7), RandomWeights(seed=7), RandomWeights(seed=8)
    w = one(torch.eye(4))
    assert torch.equal(w, two(torch.eye(4)))
    assert not torch.equal(w, other(torch.eye(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_group_has_all_the_weight():
    assert RandomWeights()(torch.tensor([[4.0]])).tolist() == [1.0]


def test_a_bad_seed_is_refused():
    with pytest.raises(TypeError, match=r"`seed` must be an integer, got 1.5"):
        RandomWeights(seed=1.5)
    with pytest.raises(ValueError, match=r"`seed` must be in \[0, 2\*\*63\), got -1"):
        RandomWeights(seed=-1)
