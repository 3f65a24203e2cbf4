"""Weighted sums of rows in parts, against the same sum in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gradalign.collectors.combine import _CPU_ROOM, CombinePlan

CPU = torch.device("cpu")
# A part that is cut, one that fills up what is left of the room, an empty one, some that keep their shape.
SHAPES = [(2, 3), (2 * _CPU_ROOM + 5,), (0, 4), (), (40, 50), (_CPU_ROOM,)]


def rows(K, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(K)]


def expected(parts, weights):
    return [
        sum(w * row[n].double() for w, row in zip(weights.tolist(), parts, strict=True)) for n in range(len(SHAPES))
    ]


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["first", "last", "apart"])
def test_the_weighted_sum_is_written_in_place_of_any_row(K, dtype, place):
    parts = rows(K, dtype)
    weights = torch.linspace(-1.5, 2.5, K + 2, dtype=torch.float64)[1:-1]
    total = expected(parts, weights)
    target = {"first": parts[0], "last": parts[-1], "apart": [torch.full_like(p, torch.nan) for p in parts[0]]}[place]
    others = [[part.clone() for part in row] for row in parts if row is not target]
    places = [part.data_ptr() for part in target]
    CombinePlan(SHAPES, CPU)(target, parts, list(weights))
    assert [part.data_ptr() for part in target] == places
    for part, wanted in zip(target, total, strict=True):
        # float32 cancels where the terms of a sum differ in sign
        assert_close(part, wanted.to(dtype), **({"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}))
    for row, before in zip([row for row in parts if row is not target], others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, before, strict=True))


def test_no_rows_make_zeros_even_of_what_is_not_finite():
    target = [torch.full(shape, torch.nan) for shape in SHAPES]
    CombinePlan(SHAPES, CPU)(target, [], [])
    assert not any(part.any() for part in target)


@pytest.mark.parametrize("weight", [1.0, 0.0, -2.0])
def test_one_row_in_its_own_place(weight):
    (row,) = rows(1)
    before = [part.clone() for part in row]
    CombinePlan(SHAPES, CPU)(row, [row], [torch.tensor(weight)])
    assert all(torch.equal(part, weight * old) for part, old in zip(row, before, strict=True))


def test_a_weight_of_one_copies_a_row_that_lies_elsewhere():
    (row,) = rows(1)
    target = [torch.zeros_like(part) for part in row]
    CombinePlan(SHAPES, CPU)(target, [row], [torch.tensor(1.0)])
    assert all(torch.equal(a, b) for a, b in zip(target, row, strict=True))


def test_half_precision_sums_in_float32():
    # 257 + 1 = 258, which bfloat16 holds; the weight 257/256 and the sum 257 it does not.
    target, other = [torch.tensor([256.0]).bfloat16()], [torch.tensor([1.0]).bfloat16()]
    CombinePlan([(1,)], CPU)(target, [target, other], [torch.tensor(257 / 256), torch.tensor(1.0)])
    assert target[0].item() == 258


def test_float64_weights_are_not_rounded_to_float32():
    target = [torch.tensor([3.0], dtype=torch.float64)]
    weight = torch.tensor(1 / 3, dtype=torch.float64)
    CombinePlan([(1,)], CPU)(target, [target, [torch.ones(1, dtype=torch.float64)]], [weight, weight])
    assert target[0].item() == 3 * (1 / 3) + 1 / 3


def test_parts_of_any_strides_are_summed_by_their_elements():
    one, two = torch.arange(6.0).view(2, 3).t(), torch.ones(3, 2)
    wanted = 2 * one - two
    target = [one]
    CombinePlan([(3, 2)], CPU)(target, [[two], target], [torch.tensor(-1.0), torch.tensor(2.0)])
    assert torch.equal(one, wanted)
    assert one.stride() == (1, 3)
