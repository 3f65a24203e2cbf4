from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign.gramian import _CPU_CHUNK, gramian
from tests.strategies import gradients


@given(J=gradients())
def test_equals_the_product_in_float64(J):
    G = gramian(J)
    assert G.dtype == torch.float64
    assert torch.equal(G, G.T)
    # Relative to the norms: an entry of two nearly orthogonal rows is all cancellation.
    sizes = J.norm(dim=1).clamp(min=1e-300)
    assert_close(G / sizes / sizes[:, None], J @ J.T / sizes / sizes[:, None])


@given(
    K=st.integers(1, 5), P=st.sampled_from([1, 2, 7, _CPU_CHUNK - 1, _CPU_CHUNK, _CPU_CHUNK + 1, 3 * _CPU_CHUNK + 5])
)
def test_reads_each_element_once_whatever_the_length(K, P):
    # Small integers: every product and sum is exact, so the answer is too.
    J = torch.randint(-8, 9, (K, P), generator=torch.Generator().manual_seed(P)).float()
    assert torch.equal(gramian(list(J)), (J.double() @ J.double().T))


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
