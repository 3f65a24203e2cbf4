from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import GAHard, GASoft
from tests.oracles.ga import gradient_alignment
from tests.strategies import gradients, gramian_of


@pytest.mark.parametrize("rule", [GASoft, GAHard])
@given(J=gradients(min_groups=2), alpha=st.floats(0, 1), data=st.data())
def test_agrees_with_the_paper_on_raw_gradients(rule, J, alpha, data):
    anchor = data.draw(st.integers(0, len(J) - 1), label="anchor")
    G = gramian_of(J)
    if rule is GAHard:  # Eq. 7 jumps at 90 degrees: an angle within rounding of that proves nothing
        rounding = 1e-12 * (G.diagonal() * G[anchor, anchor]).sqrt()
        assume(bool(((G[anchor].abs() > rounding) | (rounding == 0)).all()))
    d = J.T @ rule(alpha, anchor=anchor)(G)
    expected = gradient_alignment(J, alpha, anchor, hard=rule is GAHard)
    # Relative to the terms that are added: they can cancel.
    scale = J[anchor].norm() + alpha * J.norm(dim=1).sum()
    assert_close(d / scale.clamp(min=1e-300), expected / scale.clamp(min=1e-300))


def test_soft_by_hand():
    # g_a = (2, 0), g_1 = (1, 3), g_2 = (-4, 1): G_aa = 4, G_1a = 2, G_2a = -8.
    # w_a = (1 - .25) + .25 (2/4 - 8/4) = .75 - .375 = .375
    J = torch.tensor([[2.0, 0.0], [1.0, 3.0], [-4.0, 1.0]], dtype=torch.float64)
    assert_close(GASoft(0.25)(J @ J.T), torch.tensor([0.375, 0.0, 0.0], dtype=torch.float64))


def test_hard_by_hand():
    # As above, but the conflicting group is dropped: w_a = .75 + .25 * 2/4 = .875
    J = torch.tensor([[2.0, 0.0], [1.0, 3.0], [-4.0, 1.0]], dtype=torch.float64)
    assert_close(GAHard(0.25)(J @ J.T), torch.tensor([0.875, 0.0, 0.0], dtype=torch.float64))
    # Only the conflicting one beside it: none is left, Eq. 7's second line, or 1 - alpha on request.
    pair = J[[0, 2]]
    assert_close(GAHard(0.25)(pair @ pair.T), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert_close(GAHard(0.25, full_step=False)(pair @ pair.T), torch.tensor([0.75, 0.0], dtype=torch.float64))


def test_right_angle_is_no_conflict():
    # theta = 90 degrees belongs to the first line of Eq. 7: the projection is 0 and w_a = 1 - alpha.
    assert_close(GAHard(0.25)(torch.eye(2)), torch.tensor([0.75, 0.0]))


def test_soft_reverses_and_clamp_stops_at_zero():
    # w_a = .5 + .5 * (-3) = -1
    G = torch.tensor([[1.0, -3.0], [-3.0, 9.0]])
    assert_close(GASoft(0.5)(G), torch.tensor([-1.0, 0.0]))
    assert_close(GASoft(0.5, clamp=True)(G), torch.tensor([0.0, 0.0]))


@given(J=gradients(min_groups=2), alpha=st.floats(0.01, 0.99))
def test_soft_reverses_exactly_where_the_docstring_says(J, alpha):
    G = gramian_of(J)
    assume(G[0, 0] > 0)
    ratio = (G[1:, 0] / G[0, 0]).sum()
    threshold = -(1 - alpha) / alpha
    assume((ratio - threshold).abs() > 1e-9 * (ratio.abs() + abs(threshold)))  # away from rounding
    assert bool(GASoft(alpha)(G)[0] < 0) == bool(ratio < threshold)


@pytest.mark.parametrize(("rule", "expected"), [(GASoft(0.3), 0.7), (GAHard(0.3), 0.7)])
def test_a_zero_anchor_projects_to_nothing(rule, expected):
    G = torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    assert_close(rule(G), torch.tensor([expected, 0.0]))


@pytest.mark.parametrize("rule", [GASoft, GAHard])
def test_the_anchor_by_name_and_by_index(rule):
    J = torch.tensor([[2.0, 0.0], [1.0, 3.0], [4.0, 1.0]], dtype=torch.float64)
    G = J @ J.T
    names = ["kd", "ce", "aux"]
    assert torch.equal(rule(0.5, anchor="ce")(G, names), rule(0.5, anchor=1)(G))
    assert torch.equal(rule(0.5, anchor=-2)(G), rule(0.5, anchor=1)(G))
    assert rule(0.5, anchor="ce").plain_weights(names) == (0.5, 0.5, 0.5)
    assert rule(0.2, anchor="ce").plain_weights(names) == (0.2, 0.8, 0.2)
    assert rule(0.2, anchor="ce").support(names) == (1,)


@pytest.mark.parametrize("rule", [GASoft, GAHard])
def test_an_unknown_anchor_offers_near_names(rule):
    with pytest.raises(
        ValueError, match=r"`anchor` must be one of 'ce_loss', 'kd', got 'ce_los'; did you mean 'ce_loss'"
    ):
        rule(anchor="ce_los")(torch.eye(2), ["ce_loss", "kd"])
    with pytest.raises(ValueError, match=r"`names` must name the groups when the anchor is a name"):
        rule(anchor="ce")(torch.eye(2))
    with pytest.raises(ValueError, match=r"`anchor` must be an index below the number of loss groups, 2, got 2"):
        rule(anchor=2)(torch.eye(2))
    with pytest.raises(TypeError, match=r"`anchor` must be a group's index or name, got 1.5"):
        rule(anchor=1.5)


@pytest.mark.parametrize("rule", [GASoft, GAHard])
@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_alpha_outside_the_unit_interval_is_refused(rule, alpha):
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got"):
        rule(alpha)


def test_switches_are_true_or_false():
    with pytest.raises(TypeError, match=r"`clamp` must be True or False, got 'no'"):
        GASoft(clamp="no")
    with pytest.raises(TypeError, match=r"`full_step` must be True or False, got 0"):
        GAHard(full_step=0)


@pytest.mark.parametrize("alpha", ["0.3", None, True])
def test_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(TypeError, match=r"`alpha` must be a number, got"):
        GASoft(alpha)
