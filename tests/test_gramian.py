from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.gramian import GramianPlan, gramian, largest_whole, make_scratch
from tests.strategies import gradients


@given(J=gradients())
def test_equals_the_product_in_float64(J):
    G = gramian(J)
    assert G.dtype == torch.float64
    assert torch.equal(G, G.T)
    # Relative to the norms: an entry of two nearly orthogonal rows is all cancellation.
    sizes = J.norm(dim=1).clamp(min=1e-300)
    assert_close(G / sizes / sizes[:, None], J @ J.T / sizes / sizes[:, None])


def integers(K, P):
    """Rows of small integers: every product and sum of theirs is exact, and so the answer has to be."""
    return torch.randint(-8, 9, (K, P), generator=torch.Generator().manual_seed(P)).float()


@given(K=st.integers(1, 5), rooms=st.sampled_from([0, 1, 3]), more=st.sampled_from([-1, 0, 1, 5, 1023, 1025]))
def test_reads_each_element_once_whatever_the_length(K, rooms, more):
    J = integers(K, max(rooms * largest_whole(K, torch.device("cpu")) + more, 1))
    assert torch.equal(gramian(list(J)), (J.double() @ J.double().T))


@given(
    K=st.integers(1, 5),
    sizes=st.lists(st.sampled_from([0, 1, 7, 1000, 1024, 4097, 90_000, 180_001]), min_size=1, max_size=8),
)
def test_rows_in_parts_are_rows(K, sizes):
    J = integers(K, sum(sizes))
    parts = [row.split(sizes) for row in J]
    assert torch.equal(gramian(parts), J.double() @ J.double().T)


@pytest.mark.parametrize("K", [1, 3, 4, 6])
def test_a_plan_is_used_again_and_shares_its_scratch(K):
    scratch = make_scratch(torch.device("cpu"), K)
    shapes = [(2, 3), (5000,), (40, 7), (), (300_000,)]
    plan, other = GramianPlan(shapes, K, scratch), GramianPlan([(17,)], K, scratch)
    for seed in range(3):
        parts = [[integers(1, torch.Size(s).numel() + seed)[0, seed:].view(s) + k for s in shapes] for k in range(K)]
        J = torch.stack([torch.cat([part.flatten() for part in row]) for row in parts]).double()
        assert torch.equal(plan(parts), J @ J.T)
        assert torch.equal(
            other([[integers(1, 17)[0]]] * K), (integers(1, 17).double() @ integers(1, 17).double().T).expand(K, K)
        )


def test_parts_of_any_strides_are_taken_by_their_elements():
    part = integers(1, 12).view(3, 4)
    plan = GramianPlan([(3, 4)], 2, make_scratch(torch.device("cpu"), 2))
    turned = part.t().contiguous().t()
    assert turned.stride() != part.stride()
    assert torch.equal(plan([[part], [turned]]), part.double().square().sum().expand(2, 2))


@pytest.mark.parametrize("K", [2, 3, 4, 8])
def test_equal_rows_have_equal_entries_to_the_last_bit(K):
    row = torch.randn(100_003)
    G = gramian([row] * K)
    assert (G[0, 0] == G).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_a_float64_sum(dtype):
    J = torch.randn(3, 200_000).to(dtype)
    exact = J.double() @ J.double().T
    assert_close(gramian(J), exact)


def test_large_float32_values_do_not_overflow():
    J = torch.full((2, 10), 1e30)
    assert_close(
        gramian(J), torch.full((2, 2), 1e61, dtype=torch.float64), rtol=1e-6, atol=0
    )  # 1e30 is rounded in float32


def test_lowered_matmul_precision_does_not_reach_it():
    J = torch.randn(2, 50_000)
    before = gramian(J)
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(gramian(J), before)
    finally:
        torch.set_float32_matmul_precision(previous)


def test_no_elements():
    assert torch.equal(gramian(torch.zeros(2, 0)), torch.zeros(2, 2, dtype=torch.float64))


def test_as_many_rows_as_anybody_asks_for():
    J = integers(700, 30)
    assert torch.equal(gramian(list(J)), J.double() @ J.double().T)


def test_where_a_fused_kernel_is_chosen_it_gets_the_parts_one_dimensional(monkeypatch):
    # Which devices it is chosen on is a table of measurements; here a plain function stands where the kernel would.
    monkeypatch.setattr("gradalign.gramian._fused_kernel", lambda num_rows, device: flat_product)
    parts = [[integers(1, 12).view(3, 4) + k, integers(1, 5)[0] * k] for k in range(3)]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in parts]).double()
    plan = GramianPlan([(3, 4), (5,)], 3, make_scratch(torch.device("cpu"), 3))
    assert torch.equal(plan(parts), J @ J.T)


def flat_product(rows):
    assert all(part.ndim == 1 and part.is_contiguous() for row in rows for part in row)
    J = torch.stack([torch.cat(row) for row in rows]).double()
    return J @ J.T
