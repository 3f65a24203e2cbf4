from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import ATTITTUD, AnchoredPCGrad
from tests.oracles.agreement import assert_agrees, well_posed
from tests.oracles.attittud import attittud
from tests.strategies import SCALES, full_rank, gradients, gramian_of

SHARES = {"good": 1.5, "bad": -0.5, "neutral": 0.25}


@given(J=gradients(min_groups=2), scale=SCALES, data=st.data())
def test_agrees_with_the_paper_on_the_anchors_own_line(J, scale, data):
    anchor = data.draw(st.integers(0, len(J) - 1), label="anchor")
    shares = data.draw(st.sampled_from([{}, SHARES]), label="shares")
    J = J * scale
    G = gramian_of(J)
    # At right angles the part along the anchor is zero, good or bad; next to it, G rounds it away.
    assert_agrees(J, ATTITTUD(**shares, anchor=anchor)(G), attittud(J, anchor, **shares))


@given(J=gradients(min_groups=3), scale=SCALES, data=st.data())
def test_agrees_with_the_paper_on_a_subspace(J, scale, data):
    basis = data.draw(st.lists(st.integers(0, len(J) - 1), min_size=1, max_size=3, unique=True), label="basis")
    rank = data.draw(st.sampled_from([None, *range(1, len(basis) + 1)]), label="rank")
    # Equal singular values have no vectors of their own, and a component that is zero has no sign: two exact
    # computations may then split differently.
    assume(well_posed(lambda: lambda J: attittud(J, 0, basis, rank, **SHARES), [J]))
    assume(clear_spectrum(J[basis]))
    J = J * scale
    w = ATTITTUD(rank, **SHARES, basis=tuple(basis))(gramian_of(J))
    # Directions are taken from G, which squares the spread of the singular values, 1e3 at most here.
    assert_agrees(J, w, attittud(J, 0, basis, rank, **SHARES), tolerance=1e-7)


def clear_spectrum(B):
    """Each singular value is either rounding or clearly more: a Gramian squares them, and 1e-8 becomes 1e-16."""
    values = torch.linalg.svdvals(B)
    return bool(((values > 1e-3 * values[0]) | (values < 1e-12 * values[0])).all())


@given(J=st.integers(3, 6).flatmap(full_rank), scale=SCALES)
def test_equal_shares_are_the_plain_sum(J, scale):
    # Whatever the subspace, the parts of an auxiliary add up to it: d = g_a + sum of the auxiliaries.
    J = J * scale
    w = ATTITTUD(good=1.0, bad=1.0, neutral=1.0, basis=(0, 1))(gramian_of(J))
    expected = J[0] + J[2:].sum(0)  # a group of the basis is no auxiliary
    assert_agrees(J, w, expected)


@given(J=gradients(min_groups=2), scale=SCALES)
def test_on_the_anchors_line_without_the_bad_part_it_is_anchored_pcgrad(J, scale):
    # Dropping what opposes g_a and keeping the rest is 2 AnchoredPCGrad at alpha = 1/2.
    G = gramian_of(J * scale)
    assert_close(ATTITTUD()(G), 2 * AnchoredPCGrad(0.5)(G))


def test_by_hand():
    # v = g_a / |g_a| = (1, 0). g_1 = (1, 3): good part (1, 0), neutral (0, 3). g_2 = (-4, 1): bad part (-4, 0).
    J = torch.tensor([[2.0, 0.0], [1.0, 3.0], [-4.0, 1.0]], dtype=torch.float64)
    w = ATTITTUD(good=2.0, bad=-0.5, neutral=0.25)(J @ J.T)
    assert_close(J.T @ w, torch.tensor([2.0 + 2.0 + 2.0, 0.75 + 0.25], dtype=torch.float64))


def test_a_subspace_by_hand():
    # Basis g_1 = (3, 0, 0), g_2 = (0, 2, 0): v_1, v_2 the first two axes. The anchor (1, -1, 5) has signs (+, -).
    # g_3 = (1, 1, 1): good (1, 0, 0), bad (0, 1, 0), neutral (0, 0, 1). With rank 1 only v_1 counts.
    J = torch.tensor([[1.0, -1.0, 5.0], [3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    shares = {"good": 2.0, "bad": -1.0, "neutral": 0.5, "basis": (1, 2)}
    assert_close(J.T @ ATTITTUD(**shares)(J @ J.T), torch.tensor([3.0, -2.0, 5.5], dtype=torch.float64))
    assert_close(J.T @ ATTITTUD(1, **shares)(J @ J.T), torch.tensor([3.0, -0.5, 5.5], dtype=torch.float64))


def test_a_basis_by_name():
    J = torch.randn(4, 6, dtype=torch.float64)
    G = J @ J.T
    named = ATTITTUD(**SHARES, basis=("b", "c"), anchor="a")(G, ["a", "b", "c", "d"])
    assert torch.equal(named, ATTITTUD(**SHARES, basis=(1, 2))(G))
    with pytest.raises(ValueError, match=r"`basis.*` must be one of 'a', 'b', got 'z'"):
        ATTITTUD(basis=("z",))(torch.eye(2), ["a", "b"])
    with pytest.raises(ValueError, match=r"`basis.*` must be an index below the number of loss groups, 2, got 2"):
        ATTITTUD(basis=(2,))(torch.eye(2))


def test_zero_gradients():
    # A zero anchor spans nothing: everything is neutral. A zero auxiliary has no parts.
    G = torch.diag(torch.tensor([0.0, 4.0, 0.0]))
    w = ATTITTUD(neutral=0.5)(G)
    assert_close(w[1], torch.tensor(0.5))
    assert w.isfinite().all()


def test_exactly_parallel_and_exactly_opposite():
    J = torch.tensor([[1.0, 2.0], [3.0, 6.0], [-2.0, -4.0]], dtype=torch.float64)
    assert_close(J.T @ ATTITTUD()(J @ J.T), 4 * J[0])  # the opposite one is all bad, and dropped
    assert_close(J.T @ ATTITTUD(bad=1.0)(J @ J.T), 2 * J[0])


@pytest.mark.parametrize("name", ["good", "bad", "neutral"])
def test_shares_that_are_not_finite_are_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be finite, got nan"):
        ATTITTUD(**{name: math.nan})
    with pytest.raises(TypeError, match=rf"`{name}` must be a number, got None"):
        ATTITTUD(**{name: None})


def test_a_bad_rank_or_basis_is_refused():
    with pytest.raises(ValueError, match=r"`rank` must be .*got 0"):
        ATTITTUD(0)
    with pytest.raises(TypeError, match=r"`rank` must be .*got 1.5"):
        ATTITTUD(1.5)
    with pytest.raises(TypeError, match=r"`basis.*` must be .*got 1.5"):
        ATTITTUD(basis=(1.5,))
