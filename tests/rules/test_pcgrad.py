from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.rules import PCGrad
from tests.oracles.pcgrad import pcgrad
from tests.strategies import PUBLISHED, conflicting, full_rank, gradients, gramian_of


@given(J=st.integers(2, 6).flatmap(lambda K: st.one_of(full_rank(K), conflicting(K))), seed=st.integers(0, 999))
def test_agrees_with_the_paper_on_raw_gradients(J, seed):
    G = gramian_of(J)
    orders = PCGrad(seed=seed)._orders(G).tolist()
    d = J.T @ PCGrad(seed=seed)(G)
    assert_close(d, pcgrad(J, orders))


def test_orders_are_permutations_of_the_others():
    orders = PCGrad(seed=1)._orders(torch.zeros(50, 5, 5))
    for i in range(5):
        assert (orders[:, i].sort(-1).values == torch.tensor([j for j in range(5) if j != i])).all()
    # Random in earnest: 50 blocks do not share one order, and every other group comes first somewhere.
    assert set(orders[:, 0, 0].tolist()) == {1, 2, 3, 4}


def test_published_example():
    # G = [[18, -22], [-22, 38]]: c1 = (1, 22/38), c2 = (22/18, 1); w = (20/9, 30/19).
    J = PUBLISHED
    assert_close(PCGrad()(J @ J.T), torch.tensor([20 / 9, 30 / 19], dtype=torch.float64))


@given(J=gradients(min_groups=2, max_groups=2))
def test_two_groups_end_in_closed_form(J):
    # The order is no choice with two groups: w_1 = 1 + max(0, -G_12) / G_11, and the same the other way.
    G = gramian_of(J)
    assume(bool((G.diagonal() > 0).all()))
    assert_close(PCGrad()(G), 1 + (-G[0, 1]).clamp(min=0) / G.diagonal())


def test_a_tiny_gradient_gets_the_weight_that_the_formula_says():
    # w_1 = 1 + 1e-155 / 1e-310: 1 / G_11 would be infinite, the quotient is not.
    G = torch.tensor([[1e-310, -1e-155], [-1e-155, 1.0]], dtype=torch.float64)
    assert_close(PCGrad()(G), torch.tensor([1e155, 1.0], dtype=torch.float64))
    assert PCGrad()(torch.tensor([[1e-40, -1e-40], [-1e-40, 4e-40]])).isfinite().all()


def test_three_groups_may_still_conflict():
    # True of the paper's algorithm, as the docstring says: a later projection undoes an earlier one.
    J = torch.tensor([[1.0, 0.0], [-0.5, 0.2], [-0.5, -1.5]], dtype=torch.float64)
    G = J @ J.T
    assert any((G @ PCGrad(seed=seed)(G) < 0).any() for seed in range(8))


def test_equal_seeds_draw_alike_and_the_global_generator_is_left_alone():
    noise = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    G = gramian_of(1.25 * torch.eye(5, dtype=torch.float64) - 0.25 + 0.1 * noise)  # every pair conflicts
    before = torch.get_rng_state()
    one, two = PCGrad(seed=7), PCGrad(seed=7)
    draws = [one(G) for _ in range(20)]
    assert all(torch.equal(w, two(G)) for w in draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(w.tolist()) for w in draws}) > 1


def test_bad_seed_and_bad_state():
    with pytest.raises(TypeError, match=r"`seed` must be an integer, got 1.5"):
        PCGrad(seed=1.5)
    with pytest.raises(ValueError, match=r"`seed` must be in \[0, 2\*\*63\), got -1"):
        PCGrad(seed=-1)
    rule = PCGrad()
    with pytest.raises(ValueError, match=r"`state` must hold a generator's state"):
        rule.load_state_dict({"generator": torch.zeros(3, dtype=torch.uint8)})
