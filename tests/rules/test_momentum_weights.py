from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import CRMOGMWeighting, PCDWeighting

from gradalign.rules import PCD, CosineGate, MomentumWeights, OLAux, PCGrad
from tests.oracles.agreement import assert_agrees, steps_from
from tests.oracles.cases_others import gate_weights
from tests.oracles.weightings import momentum_weighting
from tests.strategies import SCALES, full_rank, gradients, gramian_of

FIRST = torch.tensor([[1.0, 0.5], [0.5, 1.0]])  # cos = .5
SECOND = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # cos = 0


@given(J=gradients(min_groups=2), scale=SCALES, momentum=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_agrees_with_the_paper_on_raw_gradients(J, scale, momentum, seed):
    steps = steps_from(J * scale, seed)
    rule = MomentumWeights(CosineGate(), momentum)
    for step, expected in zip(steps, momentum_weighting(steps, gate_weights, momentum), strict=True):
        assert_agrees(step, rule(gramian_of(step)), expected)


def test_by_hand():
    # (1, .5), then .9 (1, .5) + .1 (1, 0) = (1, .45), then (1, .405).
    rule = MomentumWeights(CosineGate(), 0.9)
    assert_close(rule(FIRST), torch.tensor([1.0, 0.5]))
    assert_close(rule(SECOND), torch.tensor([1.0, 0.45]))
    assert_close(rule(SECOND), torch.tensor([1.0, 0.405]))


def test_without_momentum_it_is_the_rule_itself():
    rule = MomentumWeights(CosineGate(), 0.0)
    rule(FIRST)
    assert_close(rule(SECOND), torch.tensor([1.0, 0.0]))


def test_a_rule_by_name():
    named, given_rule = MomentumWeights("cosine-gate"), MomentumWeights(CosineGate())
    for G in (FIRST, SECOND):
        assert torch.equal(named(G), given_rule(G))


@given(data=st.data(), seed=st.integers(0, 99))
def test_agrees_with_torchjd(data, seed):
    J = data.draw(full_rank(2), label="J")
    ours, theirs = MomentumWeights(PCD(), 0.7), CRMOGMWeighting(PCDWeighting(eps=0.0), 0.7)
    for step in steps_from(J, seed):
        G = gramian_of(step)
        assert_close(ours(G), theirs(G))


@pytest.mark.parametrize("make", [lambda: OLAux(horizon=2), lambda: PCGrad(seed=4), PCD])
def test_the_inner_rules_memory_is_part_of_the_state(make):
    # Without it the OLAux sum or the generator would start again at the load.
    G = gramian_of(torch.randn(4, 6, dtype=torch.float64))
    G[0, 1:] = -G[0, 1:].abs()
    G[1:, 0] = G[0, 1:]
    rule, fresh = MomentumWeights(make()), MomentumWeights(make())
    rule(G)
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        assert torch.equal(fresh(G), rule(G))


def test_an_inner_rule_of_its_own():
    # Two wrappers, two memories: what one sees the other does not.
    one, two = MomentumWeights("pcd"), MomentumWeights("pcd")
    one(FIRST)
    assert torch.equal(two(SECOND), MomentumWeights("pcd")(SECOND))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.1, math.nan])
def test_momentum_outside_the_unit_interval_is_refused(momentum):
    with pytest.raises(ValueError, match=r"`momentum` must be (in \[0, 1\)|finite and at least 0), got"):
        MomentumWeights("sum", momentum)


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match=r"`rule` must be a Rule, which has weights to average, got int"):
        MomentumWeights(3)
    with pytest.raises(ValueError, match=r"`rule` must be one of .*got 'summ'; did you mean 'sum'"):
        MomentumWeights("summ")
