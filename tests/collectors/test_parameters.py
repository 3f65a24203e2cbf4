from __future__ import annotations

import pytest
import torch
from torch import nn

from gradalign.collectors.parameters import OUTSIDE, Layout, layout_key, make_layout, quick_key
from gradalign.collectors.pool import CollectorPool


def parameter(*shape, **kind):
    return nn.Parameter(torch.zeros(shape, **kind))


def elements(count):
    return torch.arange(count, dtype=torch.float32)


PLACES = {
    "contiguous": lambda: torch.zeros(3, 4),
    "transposed": lambda: torch.zeros(5, 2).t(),
    "permuted": lambda: torch.zeros(2, 3, 4).permute(2, 0, 1),
    "channels_last": lambda: torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.zeros(()),
    "empty": lambda: torch.zeros(0, 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_gradient_with_the_parameters_strides_is_itself(place):
    p = nn.Parameter(PLACES[place]())
    layout = Layout([parameter(2), p], [0, 0], 1)
    gradient = torch.empty_like(p)
    assert layout.strides[1] == p.stride()
    assert layout.sizes == (2, p.numel())
    assert layout.laid_out(1, gradient) is gradient


@pytest.mark.parametrize("place", PLACES)
def test_a_gradient_with_other_strides_is_copied_into_the_parameters(place):
    p = nn.Parameter(PLACES[place]())
    layout = Layout([p], [0], 1)
    for gradient in (
        elements(p.numel()).view(p.shape).contiguous(),
        elements(p.numel()).view(tuple(reversed(p.shape))).permute(tuple(reversed(range(p.ndim)))),
        torch.tensor(2.0).expand(p.shape),
        elements(2 * p.numel())[::2].view(p.shape),
    ):
        before = gradient.clone()
        made = layout.laid_out(0, gradient)
        assert torch.equal(made, before)
        assert not made.requires_grad
        assert made.stride() == p.stride() or p.numel() <= 1
        if made is not gradient:
            assert p.numel() > 1
            assert made.untyped_storage().data_ptr() != gradient.untyped_storage().data_ptr()


@pytest.mark.parametrize("place", PLACES)
def test_flat_is_every_element_once_in_the_order_of_memory(place):
    p = nn.Parameter(PLACES[place]())
    layout = Layout([p], [0], 1)
    room = elements(p.numel() + 7)
    gradient = room[7:].as_strided(p.shape, p.stride())
    flat = layout.flat(0, gradient)
    assert torch.equal(flat, room[7:])
    flat.fill_(-1.0)
    assert (gradient == -1.0).all()
    assert torch.equal(room[:7], elements(7))


def test_a_parameter_that_is_not_dense_gets_dense_strides():
    sliced = torch.zeros(4, 6)[:, ::2].requires_grad_()
    layout = Layout([sliced], [0], 1)
    gradient = torch.zeros(4, 6)[:, ::2].copy_(elements(12).view(4, 3))
    made = layout.laid_out(0, gradient)
    assert made.is_contiguous()
    assert torch.equal(layout.flat(0, made), elements(12))


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


def changes(groups):
    """Ways to change what a layout depends on, each with its name."""
    a, b = groups[0]["params"]
    return {
        "frozen": lambda: b.requires_grad_(False),
        "dtype": lambda: setattr(a, "data", a.data.double()),
        "shape": lambda: setattr(a, "data", torch.zeros(7)),
        "added": lambda: groups[0]["params"].append(parameter(1)),
        "another": lambda: groups[0]["params"].__setitem__(1, parameter(1)),
        "moved": lambda: groups.append({"params": [groups[0]["params"].pop()]}),
        "transposed in place": lambda: setattr(a, "data", a.data.t()),
        "viewed in place": lambda: setattr(a, "data", a.data.view(6)),
    }


@pytest.mark.parametrize("change", changes([{"params": [None, None]}]))
def test_the_keys_change_with_what_a_layout_depends_on(change):
    groups = [{"params": [parameter(2, 3), parameter(1)]}]
    key, quick = layout_key(groups), quick_key(groups)
    assert (layout_key(groups), quick_key(groups)) == (key, quick)
    changes(groups)[change]()
    assert layout_key(groups) != key
    assert quick_key(groups) != quick


def test_the_keys_come_back():
    groups = [{"params": [parameter(2, 3), parameter(1)]}]
    key, quick = layout_key(groups), quick_key(groups)
    groups[0]["params"][1].requires_grad_(False)
    groups[0]["params"][1].requires_grad_(True)
    assert (layout_key(groups), quick_key(groups)) == (key, quick)


class Made:
    """As much of a collector as the pool looks at."""

    pending = 0
    spoiled = False


def pool(scope="all", granularity="global"):
    checked = []
    return CollectorPool(scope, granularity, checked.append), checked


def test_the_pool_makes_a_layout_once_for_the_same_parameters():
    groups = [{"params": [parameter(2, 3), parameter(1)]}]
    made, checked = pool(granularity="tensor")
    layout = made.layout(groups)
    assert layout.blocks == (0, 1)
    assert made.layout(groups) is layout
    assert checked == [groups]
    groups[0]["params"][0].data = groups[0]["params"][0].data.clone()  # elsewhere, and otherwise the same
    assert made.layout(groups) is layout
    groups[0]["params"][0].requires_grad_(False)
    assert made.layout(groups).blocks == (0,)
    assert len(checked) == 2


def test_the_pool_makes_a_collector_once_and_forgets_it_with_its_layout():
    groups = [{"params": [parameter(2, 3), parameter(1)]}]
    made, _ = pool()
    made.layout(groups)
    assert made.current is None
    one = made.get(("stacked", 2), Made)
    other = made.get(("kept", 1), Made)
    assert made.get(("stacked", 2), Made) is one
    assert made.current is one
    assert made.get(("kept", 1), Made) is other
    more = made.get(("stacked", 3), Made)
    assert made.get(("stacked", 2), Made) not in (one, more)  # one of a kind is kept
    assert made.get(("kept", 1), Made) is other
    groups[0]["params"][0].requires_grad_(False)
    made.layout(groups)
    assert made.current is None
    assert made.get(("kept", 1), Made) is not other


def test_the_pool_refuses_other_parameters_while_micro_batches_wait():
    groups = [{"params": [parameter(2, 3), parameter(1)]}]
    made, checked = pool()
    made.layout(groups)
    assert not made.waiting
    current = made.get(("stacked", 2), Made)
    assert not made.waiting
    for state in ("pending", "spoiled"):
        setattr(current, state, 1)
        assert made.waiting
        made.layout(groups)
        groups[0]["params"][0].requires_grad_(False)
        with pytest.raises(RuntimeError, match="parameters must stay the same while micro-batches wait"):
            made.layout(groups)
        groups[0]["params"][0].requires_grad_(True)
        setattr(current, state, 0)
    assert len(checked) == 1


def test_the_pool_refuses_an_optimizer_without_parameters_to_train():
    made, _ = pool()
    with pytest.raises(ValueError, match=r"must hold a parameter that requires a gradient, got none"):
        made.layout([{"params": [parameter(1).requires_grad_(False)]}])
