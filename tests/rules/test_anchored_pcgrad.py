from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import AnchoredPCGrad
from tests.oracles.agreement import assert_agrees
from tests.oracles.anchored_pcgrad import anchored_pcgrad
from tests.strategies import PUBLISHED, SCALES, gradients, gramian_of


@given(J=gradients(min_groups=2), scale=SCALES, alpha=st.floats(0, 1), data=st.data())
def test_agrees_with_the_projection_of_raw_gradients(J, scale, alpha, data):
    J = J * scale
    anchor = data.draw(st.integers(0, len(J) - 1), label="anchor")
    w = AnchoredPCGrad(alpha, anchor=anchor)(gramian_of(J))
    assert_agrees(J, w, anchored_pcgrad(J, alpha, anchor))


@given(J=gradients(min_groups=2), scale=SCALES, alpha=st.floats(0, 1))
def test_what_is_kept_never_pulls_against_the_anchor(J, scale, alpha):
    # <d, g_a> = (1 - alpha) |g_a|^2 + alpha sum_k max(0, <g_k, g_a>) >= 0
    G = gramian_of(J * scale)
    w = AnchoredPCGrad(alpha)(G)
    expected = (1 - alpha) * G[0, 0] + alpha * G[1:, 0].clamp(min=0).sum()
    size = (G[0].abs() @ w.abs()).clamp(min=1e-300)
    assert_close(G[0] @ w / size, expected / size)


def test_by_hand():
    # G_10 = -2: w_a = .5 - .5 * (-2)/1 = 1.5, and the auxiliary keeps .5. A friendly one adds nothing to the anchor.
    G = torch.tensor([[1.0, -2.0], [-2.0, 9.0]])
    assert_close(AnchoredPCGrad(0.5)(G), torch.tensor([1.5, 0.5]))
    assert_close(AnchoredPCGrad(0.25)(G.abs()), torch.tensor([0.75, 0.25]))


def test_on_the_published_pair():
    # The anchor is row 2: d = g_2 / 2 + (g_1 + 22/38 g_2) / 2.
    J = PUBLISHED
    w = AnchoredPCGrad(0.5, anchor=1)(J @ J.T)
    assert_close(w, torch.tensor([0.5, 0.5 + 0.5 * 22 / 38], dtype=torch.float64))


def test_exactly_parallel_and_exactly_opposite():
    # An opposite auxiliary is nothing but conflict: all of it goes. A parallel one stays whole.
    g = torch.tensor([[1.0, 2.0], [-3.0, -6.0], [2.0, 4.0]], dtype=torch.float64)
    d = g.T @ AnchoredPCGrad(0.5)(g @ g.T)
    assert_close(d, 0.5 * g[0] + 0.5 * g[2])


def test_a_zero_anchor_projects_nothing():
    G = torch.tensor([[0.0, 0.0], [0.0, 5.0]])
    assert_close(AnchoredPCGrad(0.25)(G), torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got"):
        AnchoredPCGrad(alpha)


def test_alpha_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"`alpha` must be a number, got None"):
        AnchoredPCGrad(None)
