"""What every rule promises, checked for every rule in the table of names.

A new rule is tested by its line in that table. Only one whose hyper-parameters have no defaults needs a line here.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign import rules
from tests.strategies import SCALES, gradients, gramian_of

REQUIRED = {"constant": lambda K: {"weights": [(-1.0) ** k * (k + 0.5) for k in range(K)]}}

ALL = pytest.mark.parametrize("name", rules.names())


def make(name, K, **extra):
    required = REQUIRED[name](K) if name in REQUIRED else {}
    return rules.get(name, **required, **extra)


def declared(name):
    return type(make(name, 2))


def draw_gradients(data, name):
    return data.draw(gradients(min_groups=declared(name).min_groups), label="J")


def magnitude(G, w):
    """The size of the terms that add up to Gw: what its rounding error is relative to."""
    return G.abs() @ w.abs()


@ALL
@given(data=st.data())
def test_weights_are_finite_and_of_the_gramians_kind(name, data):
    G = gramian_of(draw_gradients(data, name))
    w = make(name, len(G))(G)
    assert w.shape == G.shape[:1]
    assert w.dtype == G.dtype
    assert w.device == G.device
    assert w.isfinite().all()


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_half_precision_agrees_with_float64(name, dtype):
    G = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 4.0, -0.25], [0.5, -0.25, 1.0]], dtype=dtype)
    w = make(name, 3)(G)
    assert w.dtype == dtype
    # Every entry of G is exact in each dtype, so only the result is rounded.
    assert_close(w, make(name, 3)(G.double()).to(dtype))


@ALL
@given(data=st.data())
def test_input_is_unchanged(name, data):
    G = gramian_of(draw_gradients(data, name))
    before = G.clone()
    make(name, len(G))(G)
    assert torch.equal(G, before)


@pytest.mark.parametrize("name", [name for name in rules.names() if declared(name).equivariant])
@given(data=st.data())
def test_permuting_the_groups_permutes_the_weights(name, data):
    G = gramian_of(draw_gradients(data, name))
    order = data.draw(st.permutations(range(len(G))), label="order")
    w = make(name, len(G))(G)
    moved = {"anchor": order.index(0)} if issubclass(declared(name), rules.AnchoredRule) else {}
    assert_close(make(name, len(G), **moved)(G[order][:, order]), w[order])


@ALL
@given(data=st.data(), scale=SCALES)
def test_scaling_all_losses_scales_the_weights_by_the_declared_degree(name, data, scale):
    G = gramian_of(draw_gradients(data, name))
    w = make(name, len(G))(G)
    assert_close(make(name, len(G))(G * scale**2), w * scale ** (declared(name).degree - 1))


@pytest.mark.parametrize("name", [name for name in rules.names() if declared(name).non_conflicting_groups])
@given(data=st.data())
def test_aligned_gradient_conflicts_with_no_group_where_declared(name, data):
    limit = declared(name).non_conflicting_groups
    smallest = declared(name).min_groups
    J = data.draw(gradients(min_groups=smallest, max_groups=int(min(limit, 6))), label="J")
    G = gramian_of(J)
    w = make(name, len(G))(G)
    # Rounding of G, of the weights and of Gw: a few units in the last place of the largest term.
    assert (G @ w >= -1e-14 * magnitude(G, w)).all()


@ALL
@given(data=st.data())
def test_zero_gradients_give_finite_weights(name, data):
    G = gramian_of(draw_gradients(data, name))
    padded = torch.zeros(len(G) + 1, len(G) + 1, dtype=G.dtype)
    padded[:-1, :-1] = G
    assert make(name, len(padded))(padded).isfinite().all()
    assert make(name, len(padded))(torch.zeros_like(padded)).isfinite().all()


@ALL
def test_one_group(name):
    G = torch.tensor([[4.0]], dtype=torch.float64)
    if declared(name).min_groups > 1:
        with pytest.raises(ValueError, match=r"must have at least 2 loss groups, got 1"):
            make(name, 1)(G)
    else:
        assert make(name, 1)(G).isfinite().all()


@ALL
@given(data=st.data())
def test_rank_one(name, data):
    size = max(2, declared(name).min_groups)
    lengths = torch.tensor(
        data.draw(st.lists(st.floats(-3, 3), min_size=size, max_size=size), label="g"), dtype=torch.float64
    )
    assert make(name, size)(lengths.outer(lengths)).isfinite().all()


@ALL
@given(data=st.data())
def test_a_gramian_that_rounding_made_indefinite_gives_finite_weights(name, data):
    G = gramian_of(draw_gradients(data, name))
    K = len(G)
    noise = torch.randn(
        K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    )
    sizes = G.diagonal().sqrt()
    rough = G + 1e-7 * (noise + noise.T) * sizes.outer(sizes) - 1e-7 * G.trace() * torch.eye(K, dtype=torch.float64)
    assert make(name, K)(rough).isfinite().all()


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_not_finite_comes_out_as_nan_in_its_block_alone(name, bad, dtype):
    G = torch.eye(3, dtype=dtype).repeat(2, 1, 1)
    G[1, 2, :] = G[1, :, 2] = bad
    w = make(name, 3)(G)
    assert w[0].isfinite().all()
    assert w[1].isnan().all()


@ALL
@given(data=st.data())
def test_blocks_are_independent(name, data):
    size = data.draw(st.integers(max(2, declared(name).min_groups), 4), label="K")
    blocks = [gramian_of(data.draw(gradients(min_groups=size, max_groups=size), label="J")) for _ in range(3)]
    w = make(name, size)(torch.stack(blocks).unsqueeze(0))
    assert w.shape == (1, 3, size)
    if not issubclass(declared(name), rules.RandomRule) or size == 2:  # with two groups there is one order
        assert_close(w[0], torch.stack([make(name, size)(G) for G in blocks]))


@ALL
@given(data=st.data())
def test_weights_are_zero_outside_the_support(name, data):
    G = gramian_of(draw_gradients(data, name))
    rule = make(name, len(G))
    names = [f"loss{k}" for k in range(len(G))]
    outside = [k for k in range(len(G)) if k not in rule.support(names)]
    assert not rule(G, names)[outside].any()
    assert rule.rescales_anchor == (len(rule.support(names)) == 1 and len(G) > 1)


@ALL
def test_plain_weights_are_one_number_a_group(name):
    names = ["a", "b", "c"]
    plain = make(name, 3).plain_weights(names)
    assert len(plain) == 3
    # Orthogonal gradients conflict with nothing; a rule that keeps every gradient then keeps its plain weights.
    if not declared(name).rescales_anchor:
        assert_close(make(name, 3)(torch.eye(3, dtype=torch.float64)), torch.tensor(plain, dtype=torch.float64))


@ALL
@given(data=st.data())
def test_a_saved_state_goes_on_with_the_same_bits(name, data, tmp_path_factory):
    size = max(4, declared(name).min_groups)
    G = gramian_of(data.draw(gradients(min_groups=size, max_groups=size), label="J"))
    rule, fresh = make(name, size), make(name, size)
    rule(G)
    path = tmp_path_factory.mktemp("state") / "rule.pt"
    torch.save(rule.state_dict(), path)
    fresh.load_state_dict(torch.load(path, weights_only=True))
    for _ in range(3):
        assert torch.equal(fresh(G), rule(G))


@ALL
def test_a_foreign_state_is_refused(name):
    with pytest.raises(ValueError, match=r"`state` must hold .* got \['nonsense'\]"):
        make(name, 2).load_state_dict({"nonsense": 1})


@ALL
def test_hyper_parameters_cannot_be_changed(name):
    rule = make(name, 2)
    for field in dataclasses.fields(rule):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(rule, field.name, 1)


@ALL
def test_repr_makes_the_rule_again(name):
    rule = make(name, 2)
    again = eval(repr(rule), vars(rules))
    assert repr(again) == repr(rule)
    G = torch.tensor([[1.0, -0.5], [-0.5, 2.0]])
    assert torch.equal(again(G), make(name, 2)(G))


@ALL
def test_bad_gramians_are_refused(name):
    rule = make(name, 2)
    with pytest.raises(TypeError, match=r"`gramian` must be a floating-point tensor, got torch.int64"):
        rule(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"`gramian` must be a floating-point tensor, got list"):
        rule([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"`gramian` must have shape \(..., K, K\) with K >= 1, got \(2, 3\)"):
        rule(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`gramian` must have shape .* got \(2,\)"):
        rule(torch.ones(2))
    with pytest.raises(ValueError, match=r"`names` must name the 2 groups of `gramian`, got \['a'\]"):
        rule(torch.eye(2), ["a"])
