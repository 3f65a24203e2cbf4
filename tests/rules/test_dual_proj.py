from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import DualProjWeighting
from torchjd.linalg import QuadprogProjector

from gradalign.rules import DualProj
from tests.oracles import dual_cone
from tests.oracles.agreement import assert_agrees
from tests.strategies import PUBLISHED, SCALES, full_rank, gradients, gramian_of, preferences


@given(J=gradients(), scale=SCALES, seed=st.integers(0, 99))
def test_agrees_with_the_projection_of_raw_gradients(J, scale, seed):
    J, p = J * scale, preferences(len(J), seed)
    # What is left of a sum that all but cancels is known from G up to the root of its rounding.
    assert_agrees(J, DualProj(preference=p)(gramian_of(J)), dual_cone.dual_proj(J, p), tolerance=1e-7)


def test_published_example():
    w = DualProj()(gramian_of(PUBLISHED))
    assert_close(w, torch.tensor([11 / 18, 1 / 2], dtype=torch.float64))
    assert_close(PUBLISHED.T @ w, torch.tensor([5.0, 10.0, 10.0], dtype=torch.float64) / 9)


@given(J=gradients(), scale=SCALES)
def test_raises_a_weight_only_for_a_loss_that_stands_still(J, scale):
    J = J * scale
    G = gramian_of(J)
    w = DualProj()(G)
    raised = w - 1 / len(J)
    size = w @ J.norm(dim=1)
    assert (raised >= 0).all()
    assert (raised * (G @ w) <= 1e-12 * size**2).all()


def test_by_hand():
    # p = (1, 0): (Gp)_2 = -1 < 0, so v_2 = 1/4 and d = g_1 + g_2 / 4; p = (0, 1): v_1 = 1.
    G = torch.tensor([[1.0, -1.0], [-1.0, 4.0]], dtype=torch.float64)
    assert_close(DualProj(preference=[1, 0])(G), torch.tensor([1.0, 0.25], dtype=torch.float64))
    assert_close(DualProj(preference=[0, 1])(G), torch.tensor([1.0, 1.0], dtype=torch.float64))


def test_opposite_parallel_and_zero_gradients():
    opposite = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    assert_close(opposite.T @ DualProj()(gramian_of(opposite)), torch.zeros(2, dtype=torch.float64))
    parallel = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(parallel.T @ DualProj()(gramian_of(parallel)), torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert_close(DualProj()(torch.tensor([[4.0]])), torch.tensor([1.0]))


@given(J=st.integers(1, 6).flatmap(full_rank), seed=st.integers(0, 99))
def test_agrees_with_torchjd(J, seed):
    p = preferences(len(J), seed)
    theirs = DualProjWeighting(p, projector=QuadprogProjector(norm_eps=0.0, reg_eps=0.0))(gramian_of(J))
    assert_agrees(J, DualProj(preference=p)(gramian_of(J)), J.T @ theirs)


def test_bad_preferences_are_refused():
    with pytest.raises(ValueError, match=r"`preference` must hold a number above 0, got \(0.0, 0.0\)"):
        DualProj(preference=[0, 0])
    with pytest.raises(ValueError, match=r"`preference\[1\]` must be finite and at least 0, got -1"):
        DualProj(preference=[1, -1])
    with pytest.raises(TypeError, match=r"`preference` must be a sequence of numbers, got 'even'"):
        DualProj(preference="even")
    with pytest.raises(ValueError, match=r"`preference` must hold one number for each of the 3 loss groups, got 2"):
        DualProj(preference=[1, 1])(torch.eye(3))
    with pytest.raises(ValueError, match=r"for each of the 2 loss groups \('a', 'b'\), got 1"):
        DualProj(preference=[1]).check_groups(2, ["a", "b"])
