from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from gradalign.collectors.parameters import make_layout
from gradalign.collectors.stacked import StackedCollector


def make(K=3, **options):
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))]
    groups = [{"params": parameters}]
    layout = make_layout(groups, options.pop("scope", "all"), options.pop("granularity", "global"))
    return parameters, StackedCollector(layout, K, shared_only=options.pop("shared_only", False))


def losses(a, b):
    # Gradients in (a1, a2, b): (1, 1, 0), (4, 0, 1), (0, 2, 1).
    return [("x", (a.sum(),)), ("y", (4 * a[0], b)), ("z", (a[1] * 2 + b,))]


def test_gramians_and_write_by_hand():
    (a, b), collector = make()
    collector.collect(losses(a, b))
    G, outside = collector.gramians()
    assert G.tolist() == [[[2, 4, 2], [4, 17, 1], [2, 1, 5]]]
    assert not outside.any()
    # 2 (1, 1, 0) - 1 (4, 0, 1) + 0.5 (0, 2, 1) = (-2, 3, -0.5)
    collector.write(torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64), range(3), [1, 1, 1])
    assert a.grad.tolist() == [-2, 3]
    assert b.grad.item() == -0.5


def test_rows_outside_the_support_are_not_read():
    (a, b), collector = make()
    collector.collect(losses(a, b))
    collector._kept[0][1].fill_(torch.nan)
    collector.write(torch.tensor([[0.0, 3.0, 0.0]]), (1,), [1, 1, 1])
    assert a.grad.tolist() == [12, 0]
    assert b.grad.item() == 3


def test_parameters_that_one_group_reaches_are_outside_where_only_shared_ones_count():
    (a, b), collector = make(2, shared_only=True)
    collector.collect([("x", (a.sum(),)), ("y", (4 * a[0], b))])
    G, outside = collector.gramians()
    assert G.tolist() == [[[2, 4], [4, 16]]]
    assert outside.tolist() == [[0, 0], [0, 1]]
    collector.write(torch.tensor([[1.0, 1.0]], dtype=torch.float64), range(2), [5, 7])
    assert a.grad.tolist() == [5, 1]
    assert b.grad.item() == 7


def test_it_keeps_one_row_less_than_groups_and_its_rows_stay_where_they_are():
    (a, b), collector = make(4)
    assert sum(row.numel() for rows in collector._kept for row in rows) == 3 * 3
    places = [row.data_ptr() for rows in collector._kept for row in rows]
    for _ in range(3):
        a.grad = b.grad = None
        collector.collect([*losses(a, b), ("w", (a[0],))])
        collector.write(torch.ones(1, 4), range(4), [1] * 4)
        assert [row.data_ptr() for rows in collector._kept for row in rows] == places
        assert not {a.grad.untyped_storage().data_ptr()} & set(places)
        assert not collector._leads  # the first row now belongs to p.grad alone


def test_half_precision_rows_are_summed_in_float32():
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    collector = StackedCollector(make_layout([{"params": [parameter]}], "all", "global"), 2, shared_only=False)
    # Gradients 256 and 1, weights 257/256 and 1: 257 + 1 = 258, which bfloat16 holds. In bfloat16 throughout, the
    # weight would be rounded to 1 and 256 + 1 to 256.
    collector.collect([("x", (256 * parameter.sum(),)), ("y", (parameter.sum(),))])
    collector.write(torch.tensor([[257 / 256, 1.0]], dtype=torch.float64), range(2), [1, 1])
    assert_close(parameter.grad, torch.tensor([258.0], dtype=torch.bfloat16), rtol=0, atol=0)
