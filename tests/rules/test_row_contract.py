"""What every rule of rows promises, checked for each in the table of names.

A new one is tested by its line in that table. Of rules that draw random numbers only one call is compared.
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
from gradalign.rules.kinds import Random, Stateful
from tests.oracles.agreement import steps_from
from tests.strategies import SCALES, full_rank, gradients

CLASSES = [rule for rule in vars(rules).values() if isinstance(rule, type) and issubclass(rule, rules.RowRule)]
NAMES = sorted({rule.name for rule in CLASSES if getattr(rule, "name", None) in rules.names()})
ALL = pytest.mark.parametrize("name", NAMES)
STATEFUL = pytest.mark.parametrize("name", [name for name in NAMES if isinstance(rules.get(name), Stateful)])


def draw_gradients(data, name):
    return data.draw(gradients(min_groups=rules.get(name).min_groups), label="J")


def fitting(name, J):
    """J, or three copies' worth of rows where the rule takes no fewer than three."""
    rule = rules.get(name)
    try:
        rule.check_groups(len(J), None)
    except ValueError:
        return torch.cat([J, J.flip(0), J])[:3]
    return J


def relative_to_terms(J, d):
    return d / J.abs().sum().clamp(min=1e-300)


@ALL
@given(data=st.data(), scale=SCALES)
def test_the_gradient_is_finite_and_of_the_rows_kind(name, data, scale):
    J = fitting(name, draw_gradients(data, name)) * scale
    rule = rules.get(name)
    for step in steps_from(J, 0, count=3):
        d = rule(step)
        assert d.shape == J.shape[1:]
        assert d.dtype == J.dtype
        assert d.device == J.device
        assert d.isfinite().all()


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_lower_precision_agrees_with_float64(name, dtype):
    J = torch.tensor([[2.0, -1.0, 0.5, 1.0], [-1.0, 4.0, -0.25, 1.0], [0.5, -0.25, 1.0, 3.0]], dtype=dtype)
    d = rules.get(name)(J)
    assert d.dtype == dtype
    if not isinstance(rules.get(name), Random):  # another dtype may draw other numbers
        # Every entry of J is exact in each dtype, so only the result is rounded.
        assert_close(d, rules.get(name)(J.double()).to(dtype))


@ALL
def test_rows_may_be_one_matrix_or_a_sequence(name):
    J = torch.randn(3, 7)
    assert torch.equal(rules.get(name)(J), rules.get(name)(list(J)))
    assert torch.equal(rules.get(name)(J), rules.get(name)(tuple(J), ["a", "b", "c"]))


@ALL
@given(data=st.data())
def test_input_is_unchanged_and_not_kept(name, data):
    J = fitting(name, draw_gradients(data, name))
    rule, twin = rules.get(name), rules.get(name)
    buffer, before = J.clone(), J.clone()
    d = rule(buffer)
    assert torch.equal(buffer, before)
    assert torch.equal(d, twin(J))
    # The same buffers hold other gradients at the next step: neither d nor the memory may look on.
    kept = d.clone()
    buffer.neg_().add_(1.0)
    assert torch.equal(d, kept)
    d.zero_()
    assert torch.equal(rule(J), twin(J))


@ALL
@given(data=st.data(), scale=SCALES, seed=st.integers(0, 99))
def test_scaling_all_losses_scales_the_gradient_by_the_declared_degree(name, data, scale, seed):
    J = fitting(name, draw_gradients(data, name))
    one, two = rules.get(name), rules.get(name)
    for step in steps_from(J, seed, count=3):
        expected = one(step) * scale ** rules.get(name).degree
        assert_close(relative_to_terms(step * scale, two(step * scale)), relative_to_terms(step * scale, expected))


@pytest.mark.parametrize("name", [name for name in NAMES if rules.get(name).equivariant])
@given(data=st.data(), seed=st.integers(0, 99))
def test_permuting_the_groups_leaves_the_gradient(name, data, seed):
    J = fitting(name, draw_gradients(data, name))
    order = data.draw(st.permutations(range(len(J))), label="order")
    moved = {"anchor": order.index(0)} if hasattr(rules.get(name), "anchor") else {}
    one, two = rules.get(name), rules.get(name, **moved)
    for step in steps_from(J, seed, count=3):
        assert_close(relative_to_terms(step, two(step[order])), relative_to_terms(step, one(step)))


@ALL
@given(data=st.data())
def test_zero_gradients(name, data):
    J = fitting(name, draw_gradients(data, name))
    padded = torch.cat([J, torch.zeros_like(J[:1])])
    rule = rules.get(name)
    for _ in range(2):
        assert rule(padded).isfinite().all()
    nothing = rules.get(name)
    for _ in range(2):
        assert not nothing(torch.zeros_like(padded)).any()
    assert nothing(padded).isfinite().all()


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_not_finite_comes_out_as_nan_and_is_forgotten(name, bad, row, dtype):
    J = torch.tensor([[2.0, -1.0, 0.5, 1.0], [-1.0, 4.0, -0.25, 1.0], [0.5, -0.25, 1.0, 3.0]], dtype=dtype)
    broken = J.clone()
    broken[row, 1] = bad
    rule, healthy = rules.get(name), rules.get(name)
    assert rule(broken)[1].isnan()  # at the very first call
    assert rule(J).isfinite().all()
    assert rule(broken)[1].isnan()
    d = rule(J)
    assert d.isfinite().all()
    if not isinstance(rule, Random):  # the broken calls drew numbers too
        healthy(J)
        assert torch.equal(d, healthy(J))


@STATEFUL
def test_the_memories_of_blocks_are_independent(name):
    A, B = steps_from(torch.randn(3, 7), 1), steps_from(torch.randn(3, 4), 2)  # of different sizes, too
    both, first, second = rules.get(name), rules.get(name), rules.get(name)
    for a, b in zip(A, B, strict=True):
        assert torch.equal(both(a, block=0), first(a, block=0))
        assert torch.equal(both(b, block=1), second(b, block=1))
    broken = A[0].clone()
    broken[0, 0] = math.nan
    both(broken, block=0)
    assert torch.equal(both(B[0], block=1), second(B[0], block=1))
    assert torch.equal(both(A[0], block=0), first(A[0], block=0))


@ALL
@given(data=st.data())
def test_a_saved_state_goes_on_with_the_same_bits(name, data, tmp_path_factory):
    J = data.draw(full_rank(3), label="J")
    rule, fresh = rules.get(name), rules.get(name)
    steps = steps_from(J, 0)
    for step in steps[:2]:
        rule(step), rule(step[:, :2], block=1)
    path = tmp_path_factory.mktemp("state") / "rule.pt"
    torch.save(rule.state_dict(), path)
    fresh.load_state_dict(torch.load(path, weights_only=True))
    for step in steps[2:]:
        assert torch.equal(fresh(step), rule(step))
        assert torch.equal(fresh(step[:, :2], block=1), rule(step[:, :2], block=1))


@ALL
@given(data=st.data())
def test_a_state_is_a_snapshot(name, data):
    J = data.draw(full_rank(3), label="J")
    rule, then = rules.get(name), rules.get(name)
    rule(J), then(J)
    state = rule.state_dict()
    rule(-2 * J)  # later calls of the rule, or of a rule that loaded the state, leave it as it was
    other = rules.get(name)
    other.load_state_dict(state)
    other(3 * J)
    again = rules.get(name)
    again.load_state_dict(state)
    assert torch.equal(again(J.flip(0)), then(J.flip(0)))


@ALL
def test_a_foreign_state_is_refused(name):
    with pytest.raises(ValueError, match=r"`state` must hold .* got \['nonsense'\]"):
        rules.get(name).load_state_dict({"nonsense": 1})


@STATEFUL
def test_a_state_of_other_groups_is_refused(name):
    saved, rule = rules.get(name), rules.get(name)
    saved(torch.randn(4, 5), ["a", "b", "c", "d"])
    rule(torch.randn(3, 5), ["a", "b", "z"])
    before = rule.state_dict()
    with pytest.raises(
        ValueError, match=r"groups of `state` must be .* 3 groups \('a', 'b', 'z'\), got 4 \('a', 'b', 'c', 'd'\)"
    ):
        rule.load_state_dict(saved.state_dict())
    other = rules.get(name)
    other(torch.randn(3, 5), ["a", "b", "c"])
    with pytest.raises(
        ValueError, match=r"groups of `state` must be .* 3 groups \('a', 'b', 'z'\), got 3 \('a', 'b', 'c'\)"
    ):
        rule.load_state_dict(other.state_dict())
    assert str(rule.state_dict()) == str(before)


@STATEFUL
def test_other_groups_at_a_later_call_are_refused(name):
    rule = rules.get(name)
    rule(torch.randn(3, 5), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"remembers, 3 groups \('a', 'b', 'c'\), got 4"):
        rule(torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"remembers, 3 groups \('a', 'b', 'c'\), got 3 \('a', 'c', 'b'\)"):
        rule(torch.randn(3, 5), ["a", "c", "b"])
    # A loaded state counts as a first call.
    fresh = rules.get(name)
    fresh.load_state_dict(rule.state_dict())
    with pytest.raises(ValueError, match=r"remembers, 3 groups \('a', 'b', 'c'\), got 4"):
        fresh(torch.randn(4, 5))


@ALL
def test_a_state_with_a_part_of_another_kind_is_refused_and_changes_nothing(name):
    rule = rules.get(name)
    rule(torch.randn(3, 5))
    for key in rule.state_dict():
        before = str(rule.state_dict())
        with pytest.raises(ValueError, match=r"`state` must hold"):
            rule.load_state_dict(rule.state_dict() | {key: "nonsense"})
        assert str(rule.state_dict()) == before


@ALL
def test_plain_weights_are_one_number_a_group(name):
    plain = rules.get(name).plain_weights(["a", "b", "c"])
    assert len(plain) == 3
    assert all(isinstance(weight, float) for weight in plain)


@ALL
def test_hyper_parameters_cannot_be_changed(name):
    rule = rules.get(name)
    for field in dataclasses.fields(rule):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(rule, field.name, 1)


@ALL
def test_repr_makes_the_rule_again(name):
    rule = rules.get(name)
    again = eval(repr(rule), vars(rules))
    assert repr(again) == repr(rule)
    J = torch.randn(3, 5)
    assert torch.equal(again(J), rules.get(name)(J))


@ALL
def test_bad_rows_are_refused(name):
    rule = rules.get(name)
    with pytest.raises(TypeError, match=r"`rows` must be floating-point tensors, got torch.int64"):
        rule(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"`rows` must be floating-point tensors, got list"):
        rule([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    with pytest.raises(TypeError, match=r"`rows` must be K tensors \(P,\) or one \(K, P\), got float"):
        rule(1.0)
    with pytest.raises(TypeError, match=r"`rows` must be K tensors \(P,\) or one \(K, P\), got list"):
        rule([])
    with pytest.raises(ValueError, match=r"`rows` must be K tensors of one shape \(P,\), got shapes"):
        rule([torch.ones(3), torch.ones(4), torch.ones(3)])
    with pytest.raises(ValueError, match=r"`rows` must be K tensors of one shape \(P,\), got shapes \[\(2, 2\)\]"):
        rule(torch.ones(3, 2, 2))
    with pytest.raises(ValueError, match=r"`names` must name the 3 groups of `rows`, got \['a'\]"):
        rule(torch.ones(3, 4), ["a"])


@STATEFUL
def test_a_block_of_another_size_is_refused(name):
    rule = rules.get(name)
    rule(torch.randn(3, 5), block=2)
    with pytest.raises(ValueError, match=r"`rows` must keep the 5 elements that \w+ remembers for block 2, got 6"):
        rule(torch.randn(3, 6), block=2)


@pytest.mark.parametrize("name", ["bloop", "excess-mtl", "moco", "trimmed-mean"])
def test_long_rows_are_taken_in_pieces_that_leave_no_trace(name, monkeypatch):
    J = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, pieces = rules.get(name), rules.get(name)
    steps = [J, J * torch.linspace(1, 3, 11, dtype=torch.float64)]
    expected = [whole(step) for step in steps]
    for module in ("rows", "excess_mtl", "trimmed_mean"):
        monkeypatch.setattr(f"gradalign.rules.{module}.CHUNK", 3)
    for rows, d in zip(steps, expected, strict=True):
        assert_close(pieces(rows), d, rtol=1e-14, atol=1e-14)  # sums in another order
