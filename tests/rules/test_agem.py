from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import AGEM
from tests.oracles.agem import agem
from tests.oracles.agreement import assert_agrees, well_posed
from tests.strategies import PUBLISHED, SCALES, gradients, gramian_of


@given(J=gradients(min_groups=2), scale=SCALES, data=st.data())
def test_agrees_with_the_paper_on_raw_gradients(J, scale, data):
    anchor = data.draw(st.integers(0, len(J) - 1), label="anchor")
    # Others that all but cancel leave in r, which the projection divides by, little but the rounding of G.
    assume(well_posed(lambda: lambda J: agem(J, anchor), [J]))
    J = J * scale
    # ... which well_posed allows to be magnified 1e3 times, and a square in G to be 1e-6 of its terms.
    assert_agrees(J, AGEM(anchor=anchor)(gramian_of(J)), agem(J, anchor), tolerance=1e-7)


@given(J=gradients(min_groups=2), scale=SCALES)
def test_the_reference_is_never_conflicted_with(J, scale):
    J = J * scale
    G = gramian_of(J)
    w = AGEM()(G)
    # <d, r> = (Gw) summed over the others; what rounds are the terms of that sum.
    assert (G @ w)[1:].sum() >= -1e-12 * (G.abs() @ w.abs()).sum()


def test_published_example():
    # g = row 2, r = row 1: g - (-22/18) r = (6, 1, 1) + 11/9 (-4, 1, 1) = (10, 20, 20)/9.
    J = PUBLISHED
    w = AGEM(anchor=1)(J @ J.T)
    assert_close(w, torch.tensor([11 / 9, 1.0], dtype=torch.float64))
    assert_close(J.T @ w, torch.tensor([10.0, 20.0, 20.0], dtype=torch.float64) / 9)


def test_by_hand_with_two_others():
    # r = g_1 + g_2: <g, r> = -3 + 1 = -2, <r, r> = 4 + 2 * 1 + 2 = 8: both others get 2/8.
    G = torch.tensor([[5.0, -3.0, 1.0], [-3.0, 4.0, 1.0], [1.0, 1.0, 2.0]])
    assert_close(AGEM()(G), torch.tensor([1.0, 0.25, 0.25]))


def test_without_conflict_the_others_are_left_out():
    G = torch.tensor([[1.0, 2.0], [2.0, 9.0]])
    assert_close(AGEM()(G), torch.tensor([1.0, 0.0]))


def test_exactly_opposite_leaves_nothing():
    J = torch.tensor([[1.0, 2.0], [-3.0, -6.0]], dtype=torch.float64)
    assert_close(J.T @ AGEM()(J @ J.T), torch.zeros(2, dtype=torch.float64))


def test_others_that_cancel_exactly_are_no_reference():
    # g_1 = -g_2: r = 0, nothing to conflict with.
    G = torch.tensor([[5.0, -3.0, 3.0], [-3.0, 4.0, -4.0], [3.0, -4.0, 4.0]])
    assert_close(AGEM()(G), torch.tensor([1.0, 0.0, 0.0]))


def test_an_unknown_anchor_is_refused():
    with pytest.raises(ValueError, match=r"`anchor` must be an index below the number of loss groups, 2, got 5"):
        AGEM(anchor=5)(torch.eye(2))
