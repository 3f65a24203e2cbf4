from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import CosineGate
from tests.oracles.agreement import assert_agrees
from tests.oracles.cosine_gate import cosine_gate
from tests.strategies import SCALES, gradients, gramian_of


def away_from_right_angles(G, anchor):
    """The hard gate jumps at 90 degrees: an angle within rounding of that proves nothing."""
    rounding = 1e-12 * (G.diagonal() * G[anchor, anchor]).sqrt()
    return bool(((G[anchor].abs() > rounding) | (rounding == 0)).all())


@pytest.mark.parametrize("hard", [False, True])
@given(J=gradients(min_groups=2), scale=SCALES, data=st.data())
def test_agrees_with_the_paper_on_raw_gradients(hard, J, scale, data):
    anchor = data.draw(st.integers(0, len(J) - 1), label="anchor")
    J = J * scale
    G = gramian_of(J)
    if hard:
        assume(away_from_right_angles(G, anchor))
    assert_agrees(J, CosineGate(hard, anchor=anchor)(G), cosine_gate(J, anchor, hard=hard))


@pytest.mark.parametrize("hard", [False, True])
@given(J=gradients(min_groups=2), scale=SCALES)
def test_gates_stay_in_the_unit_interval_and_no_gate_lets_conflict_in(hard, J, scale):
    G = gramian_of(J * scale)
    w = CosineGate(hard)(G)
    assert w[0] == 1
    assert ((w >= 0) & (w <= 1)).all()
    assert not w[1:][G[1:, 0] < 0].any()
    # So <d, g_a> = G_aa + sum_k w_k <g_k, g_a> is at least G_aa.
    assert G[0] @ w >= G[0, 0] * (1 - 1e-14)


def test_by_hand():
    # cos = 2 / (1 * 4) = .5, and -1 / (1 * 2) = -.5
    G = torch.tensor([[1.0, 2.0, -1.0], [2.0, 16.0, 0.0], [-1.0, 0.0, 4.0]])
    assert_close(CosineGate()(G), torch.tensor([1.0, 0.5, 0.0]))
    assert_close(CosineGate(hard=True)(G), torch.tensor([1.0, 1.0, 0.0]))


def test_published_pair_conflicts():
    # cos = -22 / sqrt(18 * 38) < 0: either gate is shut.
    G = torch.tensor([[18.0, -22.0], [-22.0, 38.0]])
    assert_close(CosineGate()(G), torch.tensor([1.0, 0.0]))
    assert_close(CosineGate(hard=True, anchor=1)(G), torch.tensor([0.0, 1.0]))


def test_parallel_opposite_and_right_angle():
    J = torch.tensor([[1.0, 2.0], [3.0, 6.0], [-2.0, -4.0], [2.0, -1.0]], dtype=torch.float64)
    G = J @ J.T
    assert_close(CosineGate()(G), torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert_close(CosineGate(hard=True)(G), torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))


def test_a_rounded_cosine_never_opens_the_gate_beyond_one():
    G = torch.tensor([[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]], dtype=torch.float64)
    assert CosineGate()(G)[1] <= 1


def test_tiny_and_huge_gradients_keep_their_cosine():
    # G_aa G_kk under- or overflows, the cosine does not.
    for unit in (1e-300, 1e300):
        G = unit * torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        assert_close(CosineGate()(G), torch.tensor([1.0, 0.5], dtype=torch.float64))


def test_the_switch_is_true_or_false():
    with pytest.raises(TypeError, match=r"`hard` must be True or False, got 1"):
        CosineGate(1)
