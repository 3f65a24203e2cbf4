from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import UPGradWeighting
from torchjd.linalg import QuadprogProjector

from gradalign.rules import PCGrad, UPGrad
from tests.oracles import dual_cone
from tests.oracles.agreement import assert_agrees
from tests.strategies import PUBLISHED, SCALES, full_rank, gradients, gramian_of, preferences


@given(J=gradients(), scale=SCALES, seed=st.integers(0, 99))
def test_agrees_with_the_projections_of_raw_gradients(J, scale, seed):
    J, p = J * scale, preferences(len(J), seed)
    # What is left of gradients that all but cancel is known from G up to the root of its rounding.
    assert_agrees(J, UPGrad(preference=p)(gramian_of(J)), dual_cone.upgrad(J, p), tolerance=1e-7)


def test_published_example():
    w = UPGrad()(gramian_of(PUBLISHED))
    assert_close(w, torch.tensor([10 / 9, 15 / 19], dtype=torch.float64))
    assert_close(PUBLISHED.T @ w, torch.tensor([50.0, 325.0, 325.0], dtype=torch.float64) / 171)


@given(J=gradients(min_groups=2, max_groups=2), scale=SCALES)
def test_pcgrad_of_two_is_twice_upgrad(J, scale):
    G = gramian_of(J * scale)
    assume(bool((G.diagonal() > 0).all()))
    assert_close(PCGrad()(G), 2 * UPGrad()(G))


@given(J=st.integers(2, 5).flatmap(full_rank), factor=st.sampled_from([1e-6, 0.5, 3.0, 1e6]))
def test_is_linear_in_the_length_of_each_gradient(J, factor):
    # UPGrad(diag(c) J) is linear in c: what a longer gradient adds is the projection of what it is longer by.
    longer = J.clone()
    longer[0] *= factor
    without = J.clone()
    p = torch.full((len(J),), 1 / len(J), dtype=torch.float64)
    p[0] = 0.0
    alone = 1 / len(J) * torch.eye(len(J), dtype=torch.float64)[0]
    expected = without.T @ UPGrad(preference=p)(gramian_of(without)) + factor * (
        J.T @ UPGrad(preference=alone)(gramian_of(J))
    )
    assert_agrees(longer, UPGrad()(gramian_of(longer)), expected, tolerance=1e-9)


def test_by_hand():
    # p = (1, 1): g_1 gives (1, 1/4), g_2 gives (1, 1); see test_dual_proj.
    G = torch.tensor([[1.0, -1.0], [-1.0, 4.0]], dtype=torch.float64)
    assert_close(UPGrad(preference=[1, 1])(G), torch.tensor([2.0, 1.25], dtype=torch.float64))


def test_opposite_and_zero_gradients():
    opposite = torch.tensor([[1.0, 2.0], [-3.0, -6.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(opposite.T @ UPGrad()(gramian_of(opposite)), torch.zeros(2, dtype=torch.float64))


@given(J=st.integers(1, 6).flatmap(full_rank), seed=st.integers(0, 99))
def test_agrees_with_torchjd(J, seed):
    p = preferences(len(J), seed)
    theirs = UPGradWeighting(p, projector=QuadprogProjector(norm_eps=0.0, reg_eps=0.0))(gramian_of(J))
    assert_agrees(J, UPGrad(preference=p)(gramian_of(J)), J.T @ theirs)
