from __future__ import annotations

import torch
from torch import nn

from gradalign.collectors.parameters import OUTSIDE, Layout, layout_key, make_layout


def parameter(*shape, **kind):
    return nn.Parameter(torch.zeros(shape, **kind))


def test_a_row_holds_every_parameter_once_with_its_own_strides():
    last = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    transposed = nn.Parameter(torch.zeros(5, 2).t())
    scalar = parameter()
    layout = Layout([last, transposed, scalar], [0, 0, 0], 1)
    (bucket,) = layout.buckets
    assert bucket.numel == 96 + 10 + 1
    row = torch.arange(bucket.numel, dtype=torch.float32)
    views = layout.views(bucket, row)
    assert [view.stride() for view in views] == [last.stride(), transposed.stride(), ()]
    seen = torch.cat([view.flatten() for view in views]).sort().values
    assert torch.equal(seen, row)


def test_a_parameter_that_is_not_dense_gets_contiguous_strides():
    sliced = torch.zeros(4, 6)[:, ::2].requires_grad_()
    layout = Layout([sliced], [0], 1)
    (bucket,) = layout.buckets
    (view,) = layout.views(bucket, torch.arange(12.0))
    assert view.is_contiguous()
    assert view.shape == (4, 3)


def test_a_bucket_a_dtype_and_blocks_side_by_side():
    parameters = [parameter(2), parameter(3, dtype=torch.float64), parameter(4), parameter(5)]
    layout = Layout(parameters, [1, 0, 0, 1], 2)
    narrow, wide = sorted(layout.buckets, key=lambda bucket: bucket.dtype.itemsize)
    assert wide.members == (1,)
    assert narrow.members == (2, 0, 3)  # block 0 first, then both of block 1
    assert layout.runs(narrow, layout.blocks) == [(0, 4, 0), (4, 11, 1)]
    assert layout.runs(narrow, [OUTSIDE, 0, 0, 0]) == [(0, 4, 0), (4, 6, OUTSIDE), (6, 11, 0)]


def test_scope_and_granularity_make_the_blocks():
    a, b, c, frozen = parameter(1), parameter(2), parameter(3), parameter(4)
    frozen.requires_grad_(False)
    groups = [{"params": [a, b]}, {"params": [c, frozen]}]
    assert make_layout(groups, "all", "global").blocks == (0, 0, 0)
    assert make_layout(groups, "all", "param_group").blocks == (0, 0, 1)
    assert make_layout(groups, "all", "tensor").blocks == (0, 1, 2)
    assert make_layout(groups, "all", ((b,), (c,))).blocks == (2, 0, 1)
    assert make_layout(groups, "all", ((b,), (c,))).num_blocks == 3
    assert make_layout(groups, "all", ((a, b), (c,))).num_blocks == 2
    assert make_layout(groups, (b, c), "param_group").blocks == (OUTSIDE, 0, 1)


def test_the_key_changes_with_what_a_layout_depends_on():
    a, b = parameter(2, 3), parameter(1)
    groups = [{"params": [a, b]}]
    key = layout_key(groups)
    assert layout_key(groups) == key
    b.requires_grad_(False)
    assert layout_key(groups) != key
    b.requires_grad_(True)
    a.data = a.data.double()
    assert layout_key(groups) != key
