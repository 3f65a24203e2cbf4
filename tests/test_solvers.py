from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qpsolvers import solve_qp
from torch.testing import assert_close

from gradalign.solvers import dual_cone_projection, min_norm_in_simplex, nonnegative_quadratic
from tests.oracles import dual_cone, mgda
from tests.strategies import (
    SCALES,
    badly_scaled,
    conflicting,
    duplicated,
    full_rank,
    gradients,
    gramian_of,
    nearly_parallel,
    rank_deficient,
    with_zeros,
)

MOST_GROUPS = 32
SIZES = st.integers(1, MOST_GROUPS)

# All hard draws but those whose gradients differ by 1e-10 of their length: squared, that is below the rounding of G.
CLEAR = SIZES.flatmap(
    lambda K: st.one_of(full_rank(K), rank_deficient(K), duplicated(K), with_zeros(K), badly_scaled(K), conflicting(K))
)
EXACT = 1e-8
# sqrt(machine epsilon): a change of G in its last digit moves the least norm by that much where it is near 0.
AS_SHARP_AS_G = 2e-8


def positive(J, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(J), dtype=torch.float64, generator=generator).exp()


def total(J, w):
    """sum_i w_i norm(g_i), the size of the problem with the w that are given and of the answer with those found."""
    return (w.abs() * J.norm(dim=1)).sum().clamp(min=1e-300)


@given(J=CLEAR, scale=SCALES, seed=st.integers(0, 999))
def test_projection_is_exact(J, scale, seed):
    J = J * scale
    u = positive(J, seed)
    d = J.T @ dual_cone_projection(gramian_of(J), u)
    expected = dual_cone.dual_proj(J, u)
    size = total(J, u)
    assert_close(d / size, expected / size, rtol=0, atol=EXACT)
    assert_close((d / size).square().sum(), (expected / size).square().sum(), rtol=0, atol=EXACT)


@given(J=SIZES.flatmap(nearly_parallel), scale=SCALES, seed=st.integers(0, 999))
def test_projection_of_nearly_parallel_gradients_is_as_exact_as_the_gramian(J, scale, seed):
    J = J * scale
    u = positive(J, seed)
    v = dual_cone_projection(gramian_of(J), u)
    size = total(J, v)
    # Ill-posed from G alone: what tells the gradients apart lies at 1e-20 of its entries.
    assert_close(J.T @ v / size, dual_cone.dual_proj(J, u) / size, rtol=0, atol=10 * AS_SHARP_AS_G)


@given(J=SIZES.flatmap(full_rank), seed=st.integers(0, 999))
def test_projection_weights_are_those_of_quadprog_on_the_gramian(J, seed):
    # Independent gradients have one v: the same program, as it is written, in another solver.
    G, u = gramian_of(J), positive(J, seed)
    K = len(J)
    expected = solve_qp(G.numpy(), np.zeros(K), lb=u.numpy(), solver="quadprog")
    # Relative to the condition of G, whose inverse the weights contain.
    assert_close(dual_cone_projection(G, u), torch.from_numpy(expected), rtol=1e-9 * torch.linalg.cond(G), atol=0)


@given(J=gradients(max_groups=MOST_GROUPS), scale=SCALES, seed=st.integers(0, 999))
def test_projection_meets_the_conditions_of_its_minimum(J, scale, seed):
    J = J * scale
    G, u = gramian_of(J), positive(J, seed)
    v = dual_cone_projection(G, u)
    norms = J.norm(dim=1)
    slack = G @ v / (norms * total(J, v)).clamp(min=1e-300)  # cosine with g_i, relative to the terms of J'v
    assert (v >= u).all()
    assert (slack >= -AS_SHARP_AS_G).all()
    raised = (v - u) * norms / total(J, v)
    assert (raised * slack <= EXACT).all()


@given(J=CLEAR, scale=SCALES)
def test_least_norm_is_exact(J, scale):
    J = J * scale
    d = J.T @ min_norm_in_simplex(gramian_of(J))
    expected = mgda.aligned_gradient(J)
    size = J.norm(dim=1).min().clamp(min=1e-300)  # the least norm is no longer than the shortest gradient
    assert_close(d / size, expected / size, rtol=0, atol=EXACT)
    assert_close((d / size).square().sum(), (expected / size).square().sum(), rtol=0, atol=EXACT)


@given(J=SIZES.flatmap(nearly_parallel), scale=SCALES)
def test_least_norm_of_nearly_parallel_gradients_is_as_exact_as_the_gramian(J, scale):
    J = J * scale
    d = J.T @ min_norm_in_simplex(gramian_of(J))
    size = J.norm(dim=1).min()
    assert_close(d / size, mgda.aligned_gradient(J) / size, rtol=0, atol=10 * AS_SHARP_AS_G)


@given(J=SIZES.flatmap(full_rank))
def test_simplex_weights_are_those_of_quadprog_on_the_gramian(J):
    G = gramian_of(J)
    K = len(J)
    expected = solve_qp(G.numpy(), np.zeros(K), A=np.ones((1, K)), b=np.ones(1), lb=np.zeros(K), solver="quadprog")
    # Relative to the condition of G, as above; absolute, since weights are 0 in one solver and 1e-17 in the other.
    assert_close(min_norm_in_simplex(G), torch.from_numpy(expected), rtol=0, atol=1e-9 * torch.linalg.cond(G))


@given(J=gradients(max_groups=MOST_GROUPS), scale=SCALES)
def test_least_norm_meets_the_conditions_of_its_minimum(J, scale):
    J = J * scale
    G = gramian_of(J)
    w = min_norm_in_simplex(G)
    assert (w >= 0).all()
    assert_close(w.sum(), torch.ones((), dtype=torch.float64))
    # (Gw)_i >= w'Gw, with equality where w_i > 0; Gw is a sum of terms norm(g_i) w_j norm(g_j).
    size = total(J, w)
    slack = (G @ w - w @ G @ w) / (J.norm(dim=1) * size).clamp(min=1e-300)
    assert (slack >= -AS_SHARP_AS_G).all()
    assert (w * J.norm(dim=1) / size * slack <= EXACT).all()


def test_by_hand():
    # G v = (v1 - v2, 4 v2 - v1); u = (1, 0): v1 = 1 stays, v2 rises until 4 v2 = v1.
    G = torch.tensor([[1.0, -1.0], [-1.0, 4.0]], dtype=torch.float64)
    u = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert_close(dual_cone_projection(G, u), torch.tensor([1.0, 0.25], dtype=torch.float64))
    # w1 = (G22 - G12) / (G11 + G22 - 2 G12) = 5/7.
    assert_close(min_norm_in_simplex(G), torch.tensor([5 / 7, 2 / 7], dtype=torch.float64))
    # Two that agree, the second much longer: the shorter is the least norm itself.
    G = torch.tensor([[1.0, 2.0], [2.0, 9.0]], dtype=torch.float64)
    assert_close(min_norm_in_simplex(G), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.equal(dual_cone_projection(G, u), u)  # no conflict: nothing rises


@pytest.mark.parametrize("K", [1, 2, 7])
def test_gradients_that_are_all_zero(K):
    G = torch.zeros(K, K, dtype=torch.float64)
    u = positive(G, K)
    assert torch.equal(dual_cone_projection(G, u), u)
    w = min_norm_in_simplex(G)
    assert (w >= 0).all()
    assert_close(w.sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_solved_in_float64(dtype):
    G = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 4.0, -0.25], [0.5, -0.25, 1.0]], dtype=dtype)
    u = torch.tensor([1.0, 0.5, 0.25], dtype=dtype)
    assert torch.equal(min_norm_in_simplex(G), min_norm_in_simplex(G.double()))
    assert torch.equal(dual_cone_projection(G, u), dual_cone_projection(G.double(), u.double()))


@given(data=st.data(), K=st.integers(1, 8))
def test_leading_dimensions_are_programs_of_their_own(data, K):
    J = torch.stack([data.draw(gradients(min_groups=K, max_groups=K).map(_six_columns), label="J") for _ in range(6)])
    G = J @ J.mT
    u = torch.stack([positive(J[0], seed) for seed in range(6)])
    sizes = J.norm(dim=-1, keepdim=True)
    for together, alone in (
        (min_norm_in_simplex(G), [min_norm_in_simplex(g) for g in G]),
        (dual_cone_projection(G, u), [dual_cone_projection(g, row) for g, row in zip(G, u, strict=True)]),
    ):
        # The gradients, since the weights of dependent ones are not unique; relative to the terms.
        terms = torch.stack(alone).unsqueeze(-1) * sizes
        size = terms.sum(-2).clamp(min=1e-300)
        assert_close(
            (together.unsqueeze(-2) @ J).squeeze(-2) / size, (terms * (J / sizes.clamp(min=1e-300))).sum(-2) / size
        )
    folded = G.unflatten(0, (2, 3))
    assert torch.equal(min_norm_in_simplex(folded), min_norm_in_simplex(G).unflatten(0, (2, 3)))
    assert torch.equal(
        dual_cone_projection(folded, u.unflatten(0, (2, 3))), dual_cone_projection(G, u).unflatten(0, (2, 3))
    )


def _six_columns(J):
    columns = J[:, :6]
    return torch.nn.functional.pad(columns, (0, 6 - columns.shape[1]))


def test_the_bound_broadcasts_with_the_gramians():
    J = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    G = J @ J.mT
    u = positive(J[0], 0)
    one_bound = dual_cone_projection(G, u)
    assert one_bound.shape == (3, 4)
    assert_close(one_bound, dual_cone_projection(G, u.expand(3, 4)))
    several_bounds = torch.diag(u)  # UPGrad's: one bound for each group, the same G
    one_gramian = dual_cone_projection(G[0], several_bounds)
    assert one_gramian.shape == (4, 4)
    assert_close(one_gramian, torch.stack([dual_cone_projection(G[0], row) for row in several_bounds]))
    assert_close(dual_cone_projection(G.unsqueeze(1), several_bounds)[0], one_gramian)


@given(J=gradients(max_groups=MOST_GROUPS), seed=st.integers(0, 999))
def test_the_same_bits_twice_and_the_input_unchanged(J, seed):
    G, u = gramian_of(J), positive(J, seed)
    before, bound = G.clone(), u.clone()
    assert torch.equal(min_norm_in_simplex(G), min_norm_in_simplex(G))
    assert torch.equal(dual_cone_projection(G, u), dual_cone_projection(G, u))
    assert torch.equal(G, before)
    assert torch.equal(u, bound)


@given(J=gradients(max_groups=MOST_GROUPS), noise=st.sampled_from([1e-15, 1e-7, 1e-3]), seed=st.integers(0, 999))
def test_a_gramian_that_is_not_quite_semi_definite_gives_finite_answers(J, noise, seed):
    G, u = gramian_of(J), positive(J, seed)
    K = len(J)
    error = torch.randn(K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sizes = G.diagonal().sqrt()
    rough = G + noise * (error + error.T) * sizes.outer(sizes) - noise * G.trace() * torch.eye(K, dtype=torch.float64)
    w, v = min_norm_in_simplex(rough), dual_cone_projection(rough, u)
    assert w.isfinite().all()
    assert v.isfinite().all()
    assert (w >= 0).all()
    assert (v >= u).all()
    assert_close(w.sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("K", [2, 3, 16, 32])
def test_exact_opposites_and_exact_copies(K):
    # Half g, half -g: the hull holds 0, and the dual cone is the plane across g.
    g = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    J = torch.cat([g.expand(K // 2, 2), -g.expand(K - K // 2, 2)])
    G = J @ J.T
    w = min_norm_in_simplex(G)
    assert_close(J.T @ w, torch.zeros(2, dtype=torch.float64))
    v = dual_cone_projection(G, positive(J, K))
    size = total(J, v)
    assert_close(J.T @ v / size, torch.zeros(2, dtype=torch.float64))
    # All the same: every w is a minimum, nothing needs to rise.
    G = g @ g.T * torch.ones(K, K, dtype=torch.float64)
    u = positive(J, K)
    assert torch.equal(dual_cone_projection(G, u), u)
    assert_close(min_norm_in_simplex(G) @ g.expand(K, 2), g[0])


@given(J=gradients(min_groups=2, max_groups=8), seed=st.integers(0, 999), data=st.data())
def test_the_order_of_the_groups_does_not_matter(J, seed, data):
    order = torch.tensor(data.draw(st.permutations(range(len(J))), label="order"))
    G, u = gramian_of(J), positive(J, seed)
    for plain, moved in (
        (min_norm_in_simplex(G), min_norm_in_simplex(G[order][:, order])),
        (dual_cone_projection(G, u), dual_cone_projection(G[order][:, order], u[order])),
    ):
        size = total(J, plain)
        assert_close(J[order].T @ moved / size, J.T @ plain / size)


@pytest.mark.parametrize("power", [20, 24, 30])
@pytest.mark.parametrize("K", [2, 3])
def test_a_pair_close_to_opposite_is_as_exact_as_its_formula(power, K):
    # x = (f_1 - c f_2, f_2 - c f_1) / (1 - c^2) with c = -(1 - d), exact in float64: 1 - c^2 = d (2 - d). A third
    # variable that is not wanted takes the way of larger programs, whose ridge of 1e-14 is corrected once.
    d = 2.0**-power
    H = torch.eye(K, dtype=torch.float64)
    H[0, 1] = H[1, 0] = -1 + d
    f = torch.tensor([1.0, 0.25, -1.0], dtype=torch.float64)[:K]
    expected = torch.tensor([1 + (1 - d) * 0.25, 0.25 + (1 - d), 0.0], dtype=torch.float64)[:K] / (d * (2 - d))
    assert_close(nonnegative_quadratic(H, f), expected, rtol=1e-8 if power < 30 else 1e-7, atol=0)
