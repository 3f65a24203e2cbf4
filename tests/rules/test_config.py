from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import ConFIG as TorchJDConFIG

from gradalign.rules import ConFIG
from tests.oracles import config
from tests.oracles.agreement import assert_agrees, clear_rank
from tests.strategies import PUBLISHED, SCALES, badly_scaled, conflicting, full_rank, gradients, gramian_of, unit_rows

INDEPENDENT = st.integers(1, 5).flatmap(lambda K: st.one_of(full_rank(K), conflicting(K), badly_scaled(K)))


@given(J=gradients(), scale=SCALES, seed=st.integers(0, 99), uniform=st.booleans())
def test_agrees_with_the_pseudo_inverse_of_raw_gradients(J, scale, seed, uniform):
    J = J * scale
    clear_rank(unit_rows(J))
    p = torch.rand(len(J), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p = None if uniform else p
    assert_agrees(J, ConFIG(preference=p)(gramian_of(J)), config.aligned_gradient(J, p))


@given(J=INDEPENDENT, scale=SCALES)
def test_cosines_with_all_gradients_are_equal(J, scale):
    J = J * scale
    assume(torch.linalg.cond(unit_rows(J)) < 1e3)
    d = J.T @ ConFIG()(gramian_of(J))
    cosines = unit_rows(J) @ d / d.norm()
    assert (cosines > 0).all()
    assert_close(cosines, cosines.mean().expand(len(J)))


@given(J=INDEPENDENT, seed=st.integers(0, 99))
def test_cosines_are_proportional_to_the_preference(J, seed):
    assume(torch.linalg.cond(unit_rows(J)) < 1e3)
    p = torch.rand(len(J), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    d = J.T @ ConFIG(preference=p)(gramian_of(J))
    cosines = unit_rows(J) @ d / d.norm()
    assert_close(cosines / cosines.sum(), p / p.sum())


@given(J=INDEPENDENT, scale=SCALES)
def test_the_length_is_the_sum_of_the_projections(J, scale):
    J = J * scale
    assume(torch.linalg.cond(unit_rows(J)) < 1e3)
    d = J.T @ ConFIG()(gramian_of(J))
    assert_close(d.norm() / J.norm(dim=1).sum(), (J @ d).sum() / d.norm() / J.norm(dim=1).sum())


def test_published_example():
    J = PUBLISHED
    # K = 2: along the bisector, w_i = (norm(g_1) + norm(g_2)) / (2 norm(g_i)).
    norms = J.norm(dim=1)
    w = ConFIG()(gramian_of(J))
    assert_close(w, norms.sum() / (2 * norms))
    published = torch.tensor([0.1588, 2.0706, 2.0706], dtype=torch.float64)
    assert_close(J.T @ w, published, rtol=0, atol=5e-5)  # its digits


def test_by_hand():
    # Orthogonal, of unit norm: d = sum, the ones of the docstring. With p = (1, 0): u = g_1, <g_1 + g_2, u> = 1.
    eye = torch.eye(2, dtype=torch.float64)
    assert_close(ConFIG()(eye), torch.ones(2, dtype=torch.float64))
    assert_close(ConFIG(preference=[1, 0])(eye), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert_close(ConFIG()(torch.tensor([[9.0]])), torch.tensor([1.0]))


def test_parallel_opposite_and_zero_gradients():
    # g and 2g: along g, as far as both together.
    J = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    w = ConFIG()(gramian_of(J))
    assert_close(J.T @ w, torch.tensor([3.0, 6.0], dtype=torch.float64))
    assert w[2] == 0
    opposite = torch.tensor([[1.0, 2.0], [-3.0, -6.0]], dtype=torch.float64)
    assert_close(opposite.T @ ConFIG()(gramian_of(opposite)), torch.zeros(2, dtype=torch.float64))
    assert_close(ConFIG()(torch.zeros(2, 2)), torch.zeros(2))


@given(J=INDEPENDENT, seed=st.integers(0, 99))
def test_agrees_with_torchjd(J, seed):
    assume(torch.linalg.cond(unit_rows(J)) < 1e3)  # of dependent gradients it counts some rounding as a direction
    p = torch.rand(len(J), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_agrees(J, ConFIG(preference=p)(gramian_of(J)), TorchJDConFIG(p)(J))


def test_a_bad_preference_is_refused():
    with pytest.raises(ValueError, match=r"`preference\[0\]` must be finite and at least 0, got -1"):
        ConFIG(preference=[-1, 1])
