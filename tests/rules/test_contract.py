"""What every rule of Gramians promises, checked for every one in the table of names.

A new rule is tested by its line in that table. Only one whose hyper-parameters have no defaults needs a line here.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradalign import rules
from tests.oracles.agreement import clear_rank
from tests.strategies import SCALES, conflicting, gradients, gramian_of

REQUIRED = {
    "constant": lambda K: {"weights": [(-1.0) ** k * (k + 0.5) for k in range(K)]},
    "momentum-weights": lambda K: {"rule": "pcgrad"},
    "sdmgrad": lambda K: {"lr": 0.1},  # its default, 10, magnifies rounding from step to step
    "olaux": lambda K: {"horizon": 2},  # so that three calls see it learn
}


def make(name, K, **extra):
    required = REQUIRED[name](K) if name in REQUIRED else {}
    return rules.get(name, **required, **extra)


def declared(name):
    return make(name, 2)


GRAMIAN_RULES = [name for name in rules.names() if isinstance(declared(name), rules.Rule)]
ALL = pytest.mark.parametrize("name", GRAMIAN_RULES)


def draw_gradients(data, name):
    return data.draw(gradients(min_groups=declared(name).min_groups), label="J") * data.draw(SCALES, label="size")


def third_call(rule, G):
    """The weights of a third call: what a rule remembers has begun to matter."""
    for _ in range(2):
        rule(G)
    return rule(G)


def sizes(J, w):
    """The length that the terms of J'w would have if none cancelled: what its rounding error is relative to."""
    return J.norm(dim=1) @ w.abs()


def assert_same_step(J, w, expected):
    """Compare J'w: where gradients depend on one another the weights are not unique, the aligned gradient is.

    A least norm is known from G up to the rounding of G, so that the vector is known up to the root of that.
    """
    difference = (J.T @ (w - expected)).norm()
    assert difference <= 1e-7 * max(sizes(J, w), sizes(J, expected))


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


EQUIVARIANT = pytest.mark.parametrize("name", [name for name in GRAMIAN_RULES if declared(name).equivariant])


def permuted(name, G, order):
    moved = {"anchor": order.index(0)} if hasattr(declared(name), "anchor") else {}
    return third_call(make(name, len(G), **moved), G[order][:, order])


@EQUIVARIANT
@given(data=st.data())
def test_permuting_the_groups_leaves_the_step_as_it_is(name, data):
    J = draw_gradients(data, name)
    G = gramian_of(J)
    order = data.draw(st.permutations(range(len(G))), label="order")
    if name == "aligned-mtl":  # every eigenvalue carries the rounding of the largest, and its scale is the least
        clear_rank(J)
        assume(make(name, len(G))(G).norm() > 1e-12)  # the preferred sum cancels: what is left is rounding
    assert_same_step(J[order], permuted(name, G, order), third_call(make(name, len(G)), G)[order])


@EQUIVARIANT
@given(data=st.data())
def test_permuting_independent_groups_permutes_the_weights(name, data):
    J = data.draw(st.integers(declared(name).min_groups, 6).flatmap(conflicting), label="J")
    G = gramian_of(J)
    order = data.draw(st.permutations(range(len(G))), label="order")
    assume(torch.linalg.cond(G) < 1e6)
    assert_close(
        permuted(name, G, order), third_call(make(name, len(G)), G)[order], rtol=1e-8, atol=1e-8
    )  # eps times cond(G)


@ALL
@given(data=st.data(), scale=SCALES)
def test_scaling_all_losses_scales_the_weights_by_the_declared_degree(name, data, scale):
    J = draw_gradients(data, name)
    G = gramian_of(J)
    w = third_call(make(name, len(G)), G)
    scale = 2.0 ** round(math.log2(scale))  # the digits of G stay: whatever else decides is not the gradients
    assert_same_step(J, third_call(make(name, len(G)), G * scale**2) / scale ** (declared(name).degree - 1), w)


@pytest.mark.parametrize("name", [name for name in GRAMIAN_RULES if declared(name).non_conflicting_groups])
@given(data=st.data())
def test_aligned_gradient_conflicts_with_no_group_where_declared(name, data):
    limit = declared(name).non_conflicting_groups
    smallest = declared(name).min_groups
    J = data.draw(gradients(min_groups=smallest, max_groups=int(min(limit, 6))), label="J") * data.draw(SCALES)
    G = gramian_of(J)
    w = make(name, len(G))(G)
    # Rounding of G, of a system solved with it, and of Gw: some units in the last place of the terms' length.
    assert (G @ w >= -1e-12 * J.norm(dim=1) * sizes(J, w)).all()


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
        with pytest.raises(ValueError, match=r"must have at least \d loss groups, got 1"):
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
    blocks = [data.draw(gradients(min_groups=size, max_groups=size), label="J") for _ in range(3)]
    w = make(name, size)(torch.stack([gramian_of(J) for J in blocks]).unsqueeze(0))
    assert w.shape == (1, 3, size)
    # A draw for each block; with two groups there is one order, and nothing to draw.
    draws = hasattr(declared(name), "seed") or name == "momentum-weights"
    if not draws or (size == 2 and name != "random-weights"):
        for J, weights in zip(blocks, w[0], strict=True):
            assert_same_step(J, weights, make(name, size)(gramian_of(J)))


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


# What these give orthogonal gradients of one length is not in the direction of their plain weights, and why.
NOT_PLAIN = {
    "ga-soft": "the auxiliaries' projections are 0",
    "ga-hard": "the same",
    "cosine-gate": "the gate is shut at 90 degrees",
    "pcd": "a small share is all that auxiliaries get",
    "krum": "one gradient is selected",
    "random-weights": "drawn",
}


@pytest.mark.parametrize("name", sorted(set(GRAMIAN_RULES) - set(NOT_PLAIN)))
def test_orthogonal_gradients_of_one_length_get_the_plain_weights_up_to_a_factor(name):
    plain = torch.tensor(make(name, 3).plain_weights(["a", "b", "c"]), dtype=torch.float64)
    w = make(name, 3)(torch.eye(3, dtype=torch.float64))
    assert_close(w / w.norm(), plain / plain.norm())


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
    rule = make(name, 3)
    again = eval(repr(rule), vars(rules))
    assert repr(again) == repr(rule)
    G = torch.tensor([[1.0, -0.5, 0.25], [-0.5, 2.0, 0.0], [0.25, 0.0, 1.0]])
    assert torch.equal(again(G), make(name, 3)(G))


@ALL
def test_bad_gramians_are_refused(name):
    rule = make(name, 3)
    with pytest.raises(TypeError, match=r"`gramian` must be a floating-point tensor, got torch.int64"):
        rule(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"`gramian` must be a floating-point tensor, got list"):
        rule([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"`gramian` must have shape \(..., K, K\) with K >= 1, got \(2, 3\)"):
        rule(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`gramian` must have shape .* got \(2,\)"):
        rule(torch.ones(2))
    with pytest.raises(ValueError, match=r"`names` must name the 3 groups of `gramian`, got \['a'\]"):
        rule(torch.eye(3), ["a"])


STATEFUL = pytest.mark.parametrize("name", [name for name in GRAMIAN_RULES if declared(name).stateful])


@STATEFUL
@given(data=st.data())
def test_what_is_not_finite_leaves_the_memory_as_it_was(name, data):
    size = max(3, declared(name).min_groups)
    G, H = (gramian_of(data.draw(gradients(min_groups=size, max_groups=size), label="J")) for _ in range(2))
    rule, undisturbed = make(name, size), make(name, size)
    for each in (rule, undisturbed):
        each(torch.stack([G, G]))
    before = undisturbed.state_dict()["memory"][0]
    rule(torch.stack([H, torch.full_like(H, math.nan)]))
    undisturbed(torch.stack([H, H]))
    after = undisturbed.state_dict()["memory"][0]
    for key, value in rule.state_dict()["memory"][0].items():
        assert torch.equal(value[0], after[key][0])
        assert torch.equal(value[1], before[key][1])


@STATEFUL
def test_other_groups_than_the_remembered_ones_are_refused_with_both_named(name):
    rule = make(name, 3)
    G = torch.eye(3, dtype=torch.float64)
    rule(G, ["a", "b", "c"])
    before = rule.state_dict()
    kept = rf"must be those that {type(rule).__name__} remembers, 3 groups \('a', 'b', 'c'\), got"
    with pytest.raises(ValueError, match=kept + r" 4 \('a', 'b', 'c', 'd'\)"):
        rule(torch.eye(4, dtype=torch.float64), ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=kept + r" 3 \('a', 'b', 'x'\)"):
        rule(G, ["a", "b", "x"])
    for blocks in ((5,), (3,), (1,)):
        with pytest.raises(ValueError, match=r"`gramian` must keep the blocks"):
            rule(G.expand(*blocks, 3, 3), ["a", "b", "c"])
    after = rule.state_dict()
    assert all(torch.equal(after["memory"][0][key], value) for key, value in before["memory"][0].items())
    rule(G)  # names are not needed again


@STATEFUL
def test_a_state_for_other_groups_is_refused_with_both_named(name):
    rule, other, fresh = make(name, 3), make(name, 3), make(name, 3)
    G = torch.eye(3, dtype=torch.float64)
    rule(G, ["a", "b", "c"])
    other(G, ["a", "b", "x"])
    with pytest.raises(ValueError, match=r"groups of `state` must be .* \('a', 'b', 'x'\), got 3 \('a', 'b', 'c'\)"):
        other.load_state_dict(rule.state_dict())
    assert other.state_dict()["names"] == ["a", "b", "x"]
    fresh.load_state_dict(rule.state_dict())
    with pytest.raises(ValueError, match=r"loss groups must be those .* 3 groups \('a', 'b', 'c'\), got 4"):
        fresh(torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"`state` must hold the memory of"):
        fresh.load_state_dict({**rule.state_dict(), "memory": {0: {"nonsense": G}}})
