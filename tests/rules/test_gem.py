from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import AGEM, GEM
from tests.oracles.agreement import assert_agrees, well_posed
from tests.oracles.gem import gem
from tests.strategies import PUBLISHED, SCALES, full_rank, gradients, gramian_of


@given(J=gradients(min_groups=2), scale=SCALES, margin=st.sampled_from([0.0, 0.1, 1.0]), data=st.data())
def test_agrees_with_the_projection_of_raw_gradients(J, scale, margin, data):
    anchor = data.draw(st.integers(0, len(J) - 1), label="anchor")
    J = J * scale
    w = GEM(margin, anchor=anchor)(gramian_of(J))
    # The ridge bounds what rounding is magnified by, to 1/ridge and the square of it in quadprog's own steps.
    assert_agrees(J, w, gem(J, margin, 1e-3, anchor), tolerance=1e-9)


@given(J=gradients(min_groups=2), scale=SCALES)
def test_without_ridge_it_is_the_projection_on_the_dual_cone_of_the_others(J, scale):
    # The nearest point of a cone may jump where its walls are all but opposite, and G cannot tell that from opposite.
    assume(well_posed(lambda: lambda J: gem(J, 0.0, 0.0, 0), [J]))
    J = J * scale
    G = gramian_of(J)
    w = GEM(ridge=0.0)(G)
    assert_agrees(J, w, gem(J, 0.0, 0.0, 0), tolerance=1e-7)  # what well_posed allows
    assert ((G @ w)[1:] >= -1e-9 * (G.abs() @ w.abs())[1:]).all()


@given(J=st.integers(2, 6).flatmap(full_rank), scale=SCALES, margin=st.sampled_from([0.0, 0.5]))
def test_the_weights_satisfy_the_optimality_conditions(J, scale, margin):
    # v >= m, (MM' + eI)v + Mg >= 0, and one of the two holds with equality for each k.
    G = gramian_of(J * scale)
    w = GEM(margin, ridge=0.01)(G)
    v = w[1:]
    slope = (G @ w)[1:] + 0.01 * G.diagonal()[1:].mean() * v
    size = (G.abs() @ w.abs())[1:]
    assert w[0] == 1
    assert (v >= margin).all()
    assert (slope >= -1e-9 * size).all()
    assert_close((v - margin) * slope / size / (1 + v), torch.zeros_like(v))


def test_published_example():
    # One memory and no ridge: A-GEM's (10, 20, 20)/9. With e = ridge |m|^2 the multiplier is 22 / (18 (1 + ridge)).
    J = PUBLISHED
    G = J @ J.T
    assert_close(J.T @ GEM(ridge=0.0, anchor=1)(G), torch.tensor([10.0, 20.0, 20.0], dtype=torch.float64) / 9)
    assert_close(GEM(ridge=0.1, anchor=1)(G), torch.tensor([22 / 18 / 1.1, 1.0], dtype=torch.float64))


@given(J=gradients(min_groups=2, max_groups=2), scale=SCALES)
def test_one_memory_in_closed_form(J, scale):
    # v = max(m, -<g, m> / ((1 + ridge) |m|^2)), A-GEM at ridge 0.
    G = gramian_of(J * scale)
    assume(G[1, 1] > 0)
    v = (-G[0, 1] / (1.001 * G[1, 1])).clamp(min=0.25)
    assert_close(GEM(0.25)(G), torch.stack([torch.ones_like(v), v]))
    assert_close(GEM(ridge=0.0)(G), AGEM()(G))


def test_two_memories_by_hand():
    # Orthogonal memories of norm 1 part: v_k = max(0, 3) and max(0, -1); e = 0.
    G = torch.tensor([[20.0, -3.0, 1.0], [-3.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert_close(GEM(ridge=0.0)(G), torch.tensor([1.0, 3.0, 0.0]))


def test_without_conflict_the_memories_are_left_out():
    assert_close(GEM()(torch.tensor([[1.0, 2.0], [2.0, 9.0]])), torch.tensor([1.0, 0.0]))


def test_a_repeated_memory_shares_its_multiplier():
    # v_1 = v_2 by symmetry: (1 + 1) v + e v = 3, e = .5.
    G = torch.tensor([[20.0, -3.0, -3.0], [-3.0, 1.0, 1.0], [-3.0, 1.0, 1.0]], dtype=torch.float64)
    assert_close(GEM(ridge=0.5)(G), torch.tensor([1.0, 1.2, 1.2], dtype=torch.float64))


@pytest.mark.parametrize("name", ["margin", "ridge"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_margin_and_ridge_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be finite and at least 0, got"):
        GEM(**{name: value})


@pytest.mark.parametrize("name", ["margin", "ridge"])
def test_margin_and_ridge_that_are_no_numbers_are_refused(name):
    with pytest.raises(TypeError, match=rf"`{name}` must be a number, got 'x'"):
        GEM(**{name: "x"})
