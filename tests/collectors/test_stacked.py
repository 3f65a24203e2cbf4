from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradalign import GradientAligner
from gradalign.collectors.parameters import make_layout
from gradalign.collectors.stacked import StackedCollector
from gradalign.rules import Constant
from tests import models


def make(K=3, **options):
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))]
    groups = [{"params": parameters}]
    layout = make_layout(groups, options.pop("scope", "all"), options.pop("granularity", "global"))
    return parameters, StackedCollector(layout, K, shared_only=options.pop("shared_only", False))


def losses(a, b):
    # Gradients in (a1, a2, b): (1, 1, 0), (4, 0, 1), (0, 2, 1).
    return [("x", (a.sum(),), None), ("y", (4 * a[0], b), None), ("z", (a[1] * 2 + b,), None)]


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
    for k in (0, 2):
        for gradient in collector.row(k):
            if gradient is not None:
                gradient.fill_(torch.nan)
    collector.write(torch.tensor([[0.0, 3.0, 0.0]]), (1,), [1, 1, 1])
    assert a.grad.tolist() == [12, 0]
    assert b.grad.item() == 3


def test_factors_multiply_the_gradients_of_their_terms():
    (a, b), collector = make(1)
    collector.collect([("x", (4 * a[0], b), (torch.tensor(0.5), torch.tensor(-3.0)))])
    assert [gradient.tolist() for gradient in collector.row(0)] == [[2, 0], -3]


def test_parameters_that_one_group_reaches_are_outside_where_only_shared_ones_count():
    (a, b), collector = make(2, shared_only=True)
    collector.collect([("x", (a.sum(),), None), ("y", (4 * a[0], b), None)])
    G, outside = collector.gramians()
    assert G.tolist() == [[[2, 4], [4, 16]]]
    assert outside.tolist() == [[0, 0], [0, 1]]
    collector.write(torch.tensor([[1.0, 1.0]], dtype=torch.float64), range(2), [5, 7])
    assert a.grad.tolist() == [5, 1]
    assert b.grad.item() == 7


def test_what_a_group_does_not_reach_has_no_row():
    (a, b), collector = make()
    collector.collect(losses(a, b))
    assert collector.row(0)[1] is None
    assert [[gradient is None for gradient in collector.row(k)] for k in range(3)] == [
        [False, True],
        [False] * 2,
        [False] * 2,
    ]
    collector.discard()
    collector.collect([("x", (b,), None), ("y", (b,), None), ("z", (2 * b,), None)])
    assert all(collector.row(k)[0] is None for k in range(3))
    collector.write(torch.ones(1, 3), range(3), [1] * 3)
    assert a.grad is None
    assert b.grad.item() == 4


def test_gradients_of_other_strides_than_the_parameters_are_taken_element_by_element():
    # Too small together for hooks, and large enough to be cut.
    weight = nn.Parameter(torch.randn(96, 128))
    collector = StackedCollector(make_layout([{"params": [weight]}], "all", "global"), 2)
    C = torch.randn(128, 96)
    (turned,) = torch.autograd.grad((weight.t() * C).sum(), [weight])
    assert turned.stride() != weight.stride()
    collector.collect([("x", ((weight.t() * C).sum(),), None), ("y", (weight.square().sum() / 2,), None)])
    G, _ = collector.gramians()
    assert_close(G[0, 0, 1], (C.t().double() * weight.detach().double()).sum())
    collector.write(torch.tensor([[2.0, 1.0]], dtype=torch.float64), range(2), [1, 1])
    assert weight.grad.stride() == weight.stride()
    assert_close(weight.grad, 2 * C.t() + weight.detach())


def test_half_precision_rows_are_summed_in_float32():
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    collector = StackedCollector(make_layout([{"params": [parameter]}], "all", "global"), 2, shared_only=False)
    # Gradients 256 and 1, weights 257/256 and 1: 257 + 1 = 258, which bfloat16 holds. In bfloat16 throughout, the
    # weight would be rounded to 1 and 256 + 1 to 256.
    collector.collect([("x", (256 * parameter.sum(),), None), ("y", (parameter.sum(),), None)])
    collector.write(torch.tensor([[257 / 256, 1.0]], dtype=torch.float64), range(2), [1, 1])
    assert_close(parameter.grad, torch.tensor([258.0], dtype=torch.bfloat16), rtol=0, atol=0)


WIDTH = 1100  # its square is above the number of elements that hooks leave alone

PLACES = {
    "contiguous": lambda n: torch.ones(n, n),
    "transposed": lambda n: torch.ones(n, n + 1).t(),
    "channels_last": lambda n: torch.ones(n // 10, n // 10, 10, 10).to(memory_format=torch.channels_last),
}


def big(others=()):
    """A parameter that is hooked, with a scalar and ``others`` that are not, under Sum."""
    weight, scalar = nn.Parameter(torch.ones(WIDTH, WIDTH)), nn.Parameter(torch.tensor(2.0))
    optimizer = GradientAligner(torch.optim.SGD([weight, scalar, *others], lr=0.1), "sum")
    return weight, scalar, optimizer


def pattern(weight):
    return torch.arange(float(weight.numel())).view(weight.shape) % 17 - 8


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [WIDTH, 30])
def test_gradients_of_any_strides_are_multiplied_and_summed(place, size):
    weight, scalar = nn.Parameter(PLACES[place](size)), nn.Parameter(torch.tensor(2.0))
    optimizer = GradientAligner(torch.optim.SGD([weight, scalar]), Constant([2.0, -3.0, 0.5]))
    C, D = pattern(weight), pattern(weight).flatten().flip(0).view(weight.shape)
    for _ in range(2):
        weight.grad = scalar.grad = None
        optimizer.backward({"a": (weight * C).sum(), "b": (weight * D).sum() + scalar, "c": weight.sum()})
        assert torch.equal(weight.grad, 2 * C - 3 * D + 0.5)
        assert weight.grad.stride() == weight.stride()
        assert scalar.grad == -3
        J = torch.stack([C.flatten(), D.flatten(), torch.ones(weight.numel())]).double()
        expected = J @ J.T
        expected[1, 1] += 1
        assert torch.equal(optimizer.report.gramian, expected)  # of integers: exact


REFERENCES = {
    "the tensor": lambda gradient: gradient,
    "a view": lambda gradient: gradient[1:, 3:],
    "detached": lambda gradient: gradient.detach(),
    "numpy": lambda gradient: gradient.numpy(),
    "a row of it": lambda gradient: gradient.unbind()[0],
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_the_user_kept_of_a_gradient_never_changes(reference):
    weight, scalar, optimizer = big()
    C = pattern(weight)
    optimizer.backward({"a": (weight * C).sum(), "b": scalar * weight.sum()})
    kept = [REFERENCES[reference](weight.grad)]
    before = [copy.deepcopy(kept[0])]
    for step in range(2, 5):
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward({"a": step * (weight * C).sum(), "b": weight.sum()})
        optimizer.backward({"a": step * (weight * C).sum(), "b": weight.square().sum()})
        kept.append(REFERENCES[reference](weight.grad))
        before.append(copy.deepcopy(kept[-1]))
    for one, old in zip(kept, before, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(old))
    assert not torch.equal(torch.as_tensor(kept[0]), torch.as_tensor(kept[1]))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_memory_is_used_again_where_nobody_kept_it(set_to_none):
    weight, scalar, optimizer = big()
    places = []
    for _ in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.backward({"a": weight.sum(), "b": scalar * weight.sum(), "c": weight.square().sum()})
        collector = optimizer._steps.pool.current
        assert collector._rows == []
        places.append((weight.grad.data_ptr(), *(kept[0].data_ptr() for kept in collector._buffers)))
    assert len(set(places[1:])) == 1
    assert len(set(places[-1][1:])) == 3  # a row each
    assert (places[0] == places[-1]) == set_to_none  # a p.grad that stays keeps the first row's memory


def test_a_gradient_that_was_kept_once_costs_new_memory_once():
    weight, scalar, optimizer = big()
    losses = lambda: {"a": weight.sum(), "b": scalar * weight.sum()}  # noqa: E731
    optimizer.backward(losses())
    kept = weight.grad
    optimizer.zero_grad()
    optimizer.backward(losses())
    place = weight.grad.data_ptr()
    assert place != kept.data_ptr()
    optimizer.zero_grad()
    optimizer.backward(losses())
    assert weight.grad.data_ptr() == place


SIZES = {"hooked": WIDTH, "small": 3}


@pytest.mark.parametrize("size", SIZES)
def test_a_gradient_that_a_function_keeps_is_not_changed(size):
    n = SIZES[size]
    a, b = nn.Parameter(torch.ones(n, n)), nn.Parameter(torch.ones(n, n))
    kept = torch.arange(float(n * n)).view(n, n) % 7
    before = kept.clone()
    optimizer = GradientAligner(torch.optim.SGD([a, b]), Constant([2.0, 3.0]))
    for _ in range(2):
        a.grad = b.grad = None
        with optimizer.accumulate():
            optimizer.backward({"x": models.Remembered.apply(a, kept), "y": models.Remembered.apply(b, kept) + a.sum()})
        optimizer.backward({"x": models.Remembered.apply(a, kept) + b.sum(), "y": models.Remembered.apply(b, kept)})
        assert torch.equal(kept, before)
        assert torch.equal(a.grad, 4 * kept + 3)
        assert torch.equal(b.grad, 6 * kept + 2)
        assert a.grad.data_ptr() != b.grad.data_ptr()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batches", [1, 3])
def test_gradients_that_share_memory_are_told_apart(size, batches):
    n = SIZES[size]
    a, b, c = nn.Parameter(torch.ones(n, n)), nn.Parameter(torch.ones(n, n)), nn.Parameter(torch.tensor(2.0))
    optimizer = GradientAligner(torch.optim.SGD([a, b, c]), Constant([2.0, 3.0, -1.0]), granularity="tensor")
    C = torch.arange(float(n * n)).view(n, n) % 5

    def losses():
        # Autograd gives a and b one tensor in "x", and in "y" one and its transpose, and expanded ones in "z".
        return {"x": ((a + b) * C).sum(), "y": ((a + b.T) * C).sum() * 2, "z": (a + b).sum() * c}

    with optimizer.accumulate():
        for _ in range(batches - 1):
            optimizer.backward(losses())
    optimizer.backward(losses())
    m = batches
    assert torch.equal(a.grad, m * (2 * C + 6 * C - 2))
    assert torch.equal(b.grad, m * (2 * C + 6 * C.T - 2))
    assert c.grad == -m * 2 * n * n
    a.grad.fill_(0.0)
    assert torch.equal(b.grad, m * (2 * C + 6 * C.T - 2))
    J = torch.stack([C.flatten(), 2 * C.flatten(), torch.full((n * n,), 2.0)]).double() * m
    assert torch.equal(optimizer.report.gramian[0], J @ J.T)


@pytest.mark.parametrize("size", SIZES)
def test_a_gradient_and_a_view_of_it_are_told_apart(size):
    n = SIZES[size]
    a, flat = nn.Parameter(torch.ones(n, n)), nn.Parameter(torch.ones(n * n))
    optimizer = GradientAligner(torch.optim.SGD([a, flat]), Constant([2.0, 3.0]))
    C = torch.arange(float(n * n)).view(n, n) % 5
    optimizer.backward({"x": ((a + flat.view(n, n)) * C).sum(), "y": 2 * ((a + flat.view(n, n)) * C).sum()})
    assert torch.equal(a.grad, 8 * C)
    assert torch.equal(flat.grad, 8 * C.flatten())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scope", ["all", "shared"])
def test_exits_reach_further_and_further(size, scope):
    n = SIZES[size]
    one, two, three = layers = [nn.Parameter(torch.ones(n, n)) for _ in range(3)]
    optimizer = GradientAligner(torch.optim.SGD(layers), Constant([2.0, 3.0, 5.0]), scope=scope)
    C = torch.arange(float(n * n)).view(n, n) % 5
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward({"1": (one * C).sum(), "2": (one + two).sum(), "3": (one + 2 * two - C * three).sum()})
        assert torch.equal(one.grad, 2 * C + 8)
        assert (two.grad == 13).all()
        assert torch.equal(three.grad, -5 * C)
        cc, c, p = C.double().square().sum(), C.double().sum(), n * n
        alone = cc if scope == "all" else 0
        expected = torch.tensor([[cc, c, c], [c, 2 * p, 3 * p], [c, 3 * p, 5 * p + alone]], dtype=torch.float64)
        assert torch.equal(optimizer.report.gramian, expected)


@pytest.mark.parametrize("size", SIZES)
def test_a_later_micro_batch_may_reach_more(size):
    n = SIZES[size]
    one, two = layers = [nn.Parameter(torch.ones(n, n)) for _ in range(2)]
    optimizer = GradientAligner(torch.optim.SGD(layers), Constant([2.0, 3.0]), granularity="tensor")
    C = torch.arange(float(n * n)).view(n, n) % 5
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward({"1": (one * C).sum(), "2": one.sum()})
            optimizer.backward({"1": one.sum(), "2": (two * C).sum()})
        optimizer.backward({"1": two.sum(), "2": (one * C + two).sum()})
        assert torch.equal(one.grad, 2 * (C + 1) + 3 * (1 + C))
        assert torch.equal(two.grad, torch.full((n, n), 2.0) + 3 * (C + 1))
        J = torch.stack([(C + 1).flatten(), (1 + C).flatten()]).double()
        assert torch.equal(optimizer.report.gramian[0], J @ J.T)
        J = torch.stack([torch.ones(n * n), (C + 1).flatten()]).double()
        assert torch.equal(optimizer.report.gramian[1], J @ J.T)


def test_only_large_parameters_are_hooked_and_never_for_longer_than_a_backward():
    weight, scalar, optimizer = big(others=[nn.Parameter(torch.ones(1000, 1000))])
    seen = []
    weight.register_hook(lambda gradient: seen.append(len(weight._backward_hooks)))
    scalar.register_hook(lambda gradient: seen.append(len(scalar._backward_hooks)))
    optimizer.backward({"a": weight.sum() * scalar})
    assert seen == [1, 1]  # a single group's gradients are left as they are
    optimizer.backward({"a": weight.sum() * scalar, "b": weight.square().sum() * scalar})
    assert sorted(seen[2:]) == [1, 1, 2, 2]  # mine, and the collector's on the large one
    assert len(weight._backward_hooks) == 1
    with pytest.raises(ValueError, match="must reach a parameter"):
        optimizer.backward({"a": weight.sum(), "b": nn.Parameter(torch.ones(())).square()})
    assert len(weight._backward_hooks) == 1
