"""update_every=n: weights that are used again, against the same weights on plain autograd's gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from gradalign import GradientAligner, NonFiniteError, rules
from gradalign.rules import MGDA, GAHard, GASoft, MomentumWeights, PCGrad
from tests import models
from tests.test_resume import same_bits


def inner_of(model):
    others = [p for p in model.parameters() if p is not model.trunk.weight]
    return torch.optim.SGD([{"params": [model.trunk.weight]}, {"params": others}], lr=0.1)


def make(rule, every=3, **options):
    model = models.make(models.TwoHeads)
    return model, GradientAligner(inner_of(model), rule, update_every=every, **options)


def losses_of(model, batch=0):
    """Losses of another batch for each number."""
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(batch))
    hidden = torch.tanh(model.trunk(inputs))
    first = model.first(hidden).square().mean()
    return {
        "first": first,
        "second": -torch.tanh(model.second(hidden)).mean(),
        "third": hidden.mean() - torch.tanh(model.second(hidden)).mean() * first,
    }


def spread(model, optimizer, granularity, scope):
    """The report's weights for each parameter, by name; plain ones outside the scope."""
    named = dict(model.named_parameters())
    weights, names = optimizer.report.weights, optimizer.report.names
    numbers = {
        "global": dict.fromkeys(named, 0),
        "tensor": {n: i for i, n in enumerate(["trunk.weight", *(n for n in named if n != "trunk.weight")])},
        "param_group": {n: int(n != "trunk.weight") for n in named},
    }
    weights = weights.view(-1, len(names))
    plain = torch.tensor(optimizer.rule.plain_weights(names), dtype=weights.dtype)
    return {
        n: weights[numbers[granularity][n]] if scope == "all" or n in ("trunk.weight", "first.weight") else plain
        for n in named
    }


def combined(model, losses, weights):
    raw = models.raw_gradients(model, losses)
    out = {}
    for n in weights:
        present = [(w, raw[k][n]) for k, w in zip(raw, weights[n].tolist(), strict=True) if raw[k][n] is not None]
        out[n] = sum(w * g for w, g in present) if present else None
    return out


def assert_gradients(model, expected):
    for n, p in model.named_parameters():
        if expected[n] is None:
            assert p.grad is None, n
        else:
            assert_close(p.grad, expected[n], rtol=1e-5, atol=1e-6, msg=lambda text, n=n: f"{n}: {text}")


@pytest.mark.parametrize("rule", [PCGrad(), GASoft(0.4), GASoft(0.4, anchor="third"), MomentumWeights(GAHard(0.4))])
@pytest.mark.parametrize("granularity", ["global", "tensor", "param_group"])
@pytest.mark.parametrize("scope", ["all", "some"])
@pytest.mark.parametrize("batches", [1, 2])
def test_between_alignments_the_last_weights_are_used(rule, granularity, scope, batches):
    rule = copy.deepcopy(rule)
    model = models.make(models.TwoHeads)
    chosen = [model.trunk.weight, model.first.weight] if scope == "some" else scope
    optimizer = GradientAligner(inner_of(model), rule, update_every=3, granularity=granularity, scope=chosen)
    reports = []
    for step in range(7):
        optimizer.zero_grad()
        with optimizer.accumulate():
            for batch in range(batches - 1):
                optimizer.backward(losses_of(model, 10 * step + batch))
        optimizer.backward(losses_of(model, 10 * step + batches - 1))
        if not reports or optimizer.report is not reports[-1]:
            reports.append(optimizer.report)
            assert step in (0, 3, 6)
        parts = [losses_of(model, 10 * step + batch) for batch in range(batches)]
        whole = {name: sum(part[name] for part in parts) for name in parts[0]}
        expected = combined(model, whole, spread(model, optimizer, granularity, scope))
        assert_gradients(model, expected)
        optimizer.step()
    assert len(reports) == 3
    assert not torch.equal(reports[0].weights, reports[1].weights)


def test_by_hand():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = GradientAligner(torch.optim.SGD([weight]), GASoft(0.5), update_every=2)
    seen = []
    for auxiliary in (3.0, -1.0, 5.0, 7.0):
        weight.grad = None
        optimizer.backward({"a": weight[0], "b": auxiliary * weight[0] + weight[1]})
        seen.append(weight.grad.tolist())
    # .5 + .5 * 3 = 2, twice; .5 + .5 * 5 = 3, twice.
    assert seen == [[2, 0], [2, 0], [3, 0], [3, 0]]


def test_a_group_without_weight_is_not_differentiated_between():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = GradientAligner(torch.optim.SGD([weight]), GASoft(0.5), update_every=2)
    for backwards in (1, 0):
        calls = []
        other = weight * 3
        other.register_hook(lambda gradient, calls=calls: calls.append(1))
        optimizer.backward({"a": weight.sum(), "b": other.sum()})
        assert len(calls) == backwards


def test_sequences_of_losses_between():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = GradientAligner(torch.optim.SGD([weight]), rules.Constant([2.0, -3.0]), update_every=2)
    for _ in range(2):
        weight.grad = None
        optimizer.backward({"a": [weight[0], 4 * weight.sum().reshape(1)], "b": [weight[1].double()]})
        assert weight.grad.tolist() == [10, 5]


def test_it_adds_to_what_is_in_grad():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = GradientAligner(torch.optim.SGD([weight]), "sum", update_every=2)
    optimizer.backward({"a": weight.sum()})
    kept = weight.grad
    optimizer.backward({"a": 2 * weight.sum()})
    assert weight.grad is kept
    assert kept.tolist() == [3, 3]


def one_weight(every=5, rule=None, **options):
    weight = torch.nn.Parameter(torch.zeros(2))
    return weight, GradientAligner(torch.optim.SGD([weight]), rule or GASoft(0.5), update_every=every, **options)


def gradient_of(weight, optimizer, losses, **options):
    optimizer.zero_grad()
    optimizer.backward(losses, **options)
    return weight.grad[0].item()


def test_other_groups_are_aligned_anew():
    weight, optimizer = one_weight()
    x = weight[0]
    assert gradient_of(weight, optimizer, {"a": x, "b": 3 * x}) == 2
    assert gradient_of(weight, optimizer, {"a": x, "b": -x}) == 2  # kept
    assert gradient_of(weight, optimizer, {"a": x, "c": -x}) == 0
    assert optimizer.report.names == ("a", "c")
    assert gradient_of(weight, optimizer, {"a": x, "c": 3 * x}) == 0  # kept
    assert gradient_of(weight, optimizer, {"c": x, "a": 5 * x}) == 3  # another order, another anchor
    assert gradient_of(weight, optimizer, {"c": x, "a": x, "b": x}) == 1.5


def test_kept_weights_of_other_groups_are_never_used_after_a_step_that_was_skipped():
    weight, optimizer = one_weight(nonfinite="skip")
    x = weight[0]
    assert gradient_of(weight, optimizer, {"a": x, "b": 3 * x}) == 2
    optimizer.zero_grad()
    optimizer.backward({"a": x, "c": x * torch.nan})
    assert gradient_of(weight, optimizer, {"a": x, "c": -x}) == 0


def test_kept_weights_of_other_groups_are_never_used_after_micro_batches_that_were_dropped():
    weight, optimizer = one_weight()
    x = weight[0]
    assert gradient_of(weight, optimizer, {"a": x, "b": 3 * x}) == 2
    with optimizer.accumulate():
        optimizer.backward({"a": x, "c": -x})
    assert gradient_of(weight, optimizer, {"a": x, "c": -x}) == 0


@pytest.mark.parametrize("first", ["thawed", "frozen"])
def test_weights_of_other_parameters_blocks_are_never_used(first):
    parameters = [torch.nn.Parameter(torch.zeros(())) for _ in range(3)]
    optimizer = GradientAligner(torch.optim.SGD(parameters), GASoft(0.5), granularity="tensor", update_every=5)

    def gradients():
        x, y, z = parameters
        optimizer.zero_grad()
        optimizer.backward({"a": x + y + z, "b": x + 3 * y + 5 * z})
        return [None if p.grad is None else p.grad.item() for p in parameters]

    for state in ("thawed", "frozen") if first == "thawed" else ("frozen", "thawed"):
        parameters[0].requires_grad_(state == "thawed")
        # .5 + .5 * (1, 3, 5)
        assert gradients() == [1 if state == "thawed" else None, 2, 3]


def test_an_error_in_an_alignment_leaves_the_next_step_one():
    weight, optimizer = one_weight(every=2)
    x = weight[0]
    gradient_of(weight, optimizer, {"a": x, "b": 3 * x})
    gradient_of(weight, optimizer, {"a": x, "b": 3 * x})
    with pytest.raises(NonFiniteError, match="'b'"):
        optimizer.backward({"a": x, "b": x * torch.inf})
    assert gradient_of(weight, optimizer, {"a": x, "b": -x}) == 0
    assert gradient_of(weight, optimizer, {"a": x, "b": 3 * x}) == 0


def test_steps_of_accumulation_count_once():
    weight, optimizer = one_weight(every=2)
    x = weight[0]
    seen = []
    for factor in (3, 5, 7):
        with optimizer.accumulate():
            optimizer.zero_grad()
            optimizer.backward({"a": x, "b": x * factor})
        optimizer.backward({"a": x, "b": x * factor})
        seen.append(weight.grad[0].item())
    assert seen == [4, 4, 8]  # twice .5 + .5 * 3, the same, twice .5 + .5 * 7


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("scope", ["all", "shared"])
@pytest.mark.parametrize("bad", ["first", "third"])
def test_what_is_not_finite_between_raises_with_the_groups(granularity, scope, bad):
    model, optimizer = make(PCGrad(), granularity=granularity, scope=scope)
    optimizer.backward(losses_of(model))
    report, before = optimizer.report, models.gradients(model)
    losses = losses_of(model, 1)
    with pytest.raises(NonFiniteError, match="must be finite, got NaN or infinity") as caught:
        optimizer.backward({**losses, bad: losses[bad] * torch.nan})
    # One backward on the weighted sum cannot tell them apart.
    together = granularity == "global" and scope == "all"
    assert caught.value.groups == (("first", "second", "third") if together else (bad,))
    assert all(repr(name) in str(caught.value) for name in caught.value.groups)
    assert optimizer.report is report
    for name, gradient in models.gradients(model).items():
        assert gradient is None if before[name] is None else torch.equal(gradient, before[name])


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_what_is_not_finite_between_is_skipped_once_and_counted(granularity):
    model, optimizer = make(GASoft(0.4), nonfinite="skip", granularity=granularity)
    optimizer.backward(losses_of(model))
    optimizer.step()
    optimizer.zero_grad()
    report = optimizer.report
    losses = losses_of(model, 1)
    optimizer.backward({**losses, "first": losses["first"] * torch.nan})
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.skipped_steps == 1
    for _ in range(2):  # the kept weights still serve both steps
        optimizer.backward(losses_of(model, 2))
        assert optimizer.report is report
        optimizer.step()
        optimizer.zero_grad()
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.backward(losses_of(model, 3))
    assert optimizer.report is not report
    assert optimizer.skipped_steps == 1


def test_what_is_not_finite_between_propagates():
    weight, optimizer = one_weight(nonfinite="propagate")
    optimizer.backward({"a": weight[0], "b": weight[0]})
    optimizer.zero_grad()
    optimizer.backward({"a": weight[0] * torch.nan, "b": weight[0]})
    assert weight.grad[0].isnan()


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, step))
        optimizer.step()


RESUMED = [
    (PCGrad(seed=5), "global"),
    (PCGrad(seed=5), "tensor"),
    (GASoft(0.4), "global"),
    (GASoft(0.4), "param_group"),
    (MomentumWeights(PCGrad(seed=3)), "global"),
]


@pytest.mark.parametrize("done", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("rule", "granularity"), RESUMED)
def test_a_resumed_run_makes_the_same_bits(rule, granularity, done, tmp_path):
    model, optimizer = make(copy.deepcopy(rule), granularity=granularity)
    train(model, optimizer, done)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    train(model, optimizer, 5, done)

    again, resumed = make(copy.deepcopy(rule), granularity=granularity)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 5, done)
    assert same_bits(model, again)


def test_the_kept_weights_are_what_makes_the_bits_the_same():
    model, optimizer = make(GASoft(0.4))
    train(model, optimizer, 2)
    state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 2, 2)
    again, resumed = make(GASoft(0.4))
    again.load_state_dict(state["model"])
    state["optimizer"]["gradalign"]["kept"] |= {"weights": None, "served": 0}
    resumed.load_state_dict(state["optimizer"])
    train(again, resumed, 2, 2)
    assert not same_bits(model, again)


def pickled(one):
    return pickle.loads(pickle.dumps(one))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_a_copy_keeps_the_weights(copied, granularity):
    model, optimizer = make(PCGrad(seed=5), granularity=granularity)
    train(model, optimizer, 2)
    again, other = copied((model, optimizer))
    train(model, optimizer, 5, 2)
    untouched = other.state_dict()["gradalign"]["kept"]["served"]
    assert untouched == 2
    train(again, other, 5, 2)
    assert same_bits(model, again)


def test_weights_that_another_update_every_has_used_up_are_made_anew():
    weight, optimizer = one_weight(every=5)
    x = weight[0]
    for _ in range(3):
        gradient_of(weight, optimizer, {"a": x, "b": 3 * x})
    other, shorter = one_weight(every=2)
    shorter.load_state_dict(optimizer.state_dict())
    assert gradient_of(other, shorter, {"a": other[0], "b": -other[0]}) == 0


@pytest.mark.parametrize(
    "kept",
    [
        {"weights": [[1.0, 0.0]], "names": ["a", "b"], "reached": [True], "served": 1},
        {"weights": torch.ones(2), "names": ["a", "b"], "reached": [True], "served": 1},
        {"weights": torch.ones(1, 3), "names": ["a", "b"], "reached": [True], "served": 1},
        {"weights": None, "names": [], "reached": [], "served": None},
        {"weights": None},
        {},
        None,
    ],
)
def test_a_state_with_bad_weights_is_refused_and_nothing_is_loaded(kept):
    weight, optimizer = one_weight()
    gradient_of(weight, optimizer, {"a": weight[0], "b": 3 * weight[0]})
    state = optimizer.state_dict()
    bad = {**state, "gradalign": {**state["gradalign"], "kept": kept, "groups": ["x", "y"]}}
    with pytest.raises(ValueError, match=r"must hold weights of shape \(blocks, K\) or None, the K names, what"):
        optimizer.load_state_dict(bad)
    assert gradient_of(weight, optimizer, {"a": weight[0], "b": -weight[0]}) == 2


def test_a_state_that_the_rule_refuses_leaves_the_kept_weights():
    weight, optimizer = one_weight(rule=PCGrad())
    x = weight[0]
    assert gradient_of(weight, optimizer, {"a": x, "b": 3 * x}) == 4
    state = optimizer.state_dict()["gradalign"]
    kept = {"weights": torch.full((1, 2), 9.0), "names": ["a", "b"], "reached": [True], "served": 1}
    bad = {**optimizer.state_dict(), "gradalign": {**state, "kept": kept, "rule_state": {}}}
    with pytest.raises(ValueError, match="`state` must hold"):
        optimizer.load_state_dict(bad)
    assert gradient_of(weight, optimizer, {"a": x, "b": 3 * x}) == 4


def test_a_rule_of_rows_has_no_weights_to_keep():
    with pytest.raises(ValueError, match=r"`update_every` must be 1 with GradDrop.*no weights to keep, got 2"):
        make("graddrop", every=2)
    make("graddrop", every=1)


@pytest.mark.parametrize("every", [0, -1, 1.0, True, "2", None])
def test_update_every_is_a_number_of_steps(every):
    with pytest.raises(
        (TypeError, ValueError), match=rf"`update_every` must be an integer of at least 1, got {every!r};"
    ):
        make("sum", every=every)


def test_every_step_is_aligned_by_default():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = GradientAligner(torch.optim.SGD([weight]), GASoft(0.5))
    x = weight[0]
    assert [gradient_of(weight, optimizer, {"a": x, "b": f * x}) for f in (3, 5, 7)] == [2, 3, 4]
    assert optimizer.state_dict()["gradalign"]["kept"]["weights"] is None


def test_with_a_probe_the_anchor_is_enough_between_and_the_probe_is_not_called():
    weight, optimizer = one_weight(every=3)
    calls = []

    def probe(factor):
        calls.append(factor)
        return {"b": factor * weight[0]}

    seen = [gradient_of(weight, optimizer, {"a": weight[0]}, probe=lambda f=f: probe(f)) for f in (3, 5, 7, 9)]
    assert seen == pytest.approx([2, 2, 2, 5], rel=1e-6)
    assert set(calls) == {3, 9}
    assert optimizer.report.collector == "probed"


def test_without_a_probe_the_anchor_alone_is_refused_between_too():
    weight, optimizer = one_weight(every=3)
    gradient_of(weight, optimizer, {"a": weight[0], "b": 3 * weight[0]})
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="`GASoft` must have at least 2 loss groups, got 1"):
        optimizer.backward({"a": weight[0]})
    assert gradient_of(weight, optimizer, {"a": weight[0]}, probe=lambda: {"b": -weight[0]}) == 2  # kept
    assert gradient_of(weight, optimizer, {"a": weight[0], "b": -weight[0]}) == 2  # kept


def test_groups_without_a_weight_are_not_differentiated_between():
    model = models.make(models.TwoHeads)
    optimizer = GradientAligner(inner_of(model), GASoft(0.4), update_every=2, granularity="tensor")
    optimizer.backward(losses_of(model))
    passed = []
    losses = losses_of(model, 1)
    for name, loss in losses.items():
        loss.register_hook(lambda gradient, name=name: passed.append(name))
    optimizer.backward(losses)
    assert passed == ["first"]


def test_weights_that_are_not_finite_are_not_kept():
    weight, optimizer = one_weight(every=4, rule=MGDA(), nonfinite="propagate")
    x = weight[0]
    gradient_of(weight, optimizer, {"a": x * torch.inf, "b": 3 * x})
    assert [gradient_of(weight, optimizer, {"a": x, "b": 3 * x}) for _ in range(3)] == [2, 2, 2]  # 1/K each
    assert gradient_of(weight, optimizer, {"a": x, "b": 3 * x}) == 1  # aligned again: the shorter gradient
    for _ in range(3):
        gradient_of(weight, optimizer, {"a": x, "b": 3 * x})
    gradient_of(weight, optimizer, {"a": x * torch.nan, "b": 3 * x})
    assert gradient_of(weight, optimizer, {"a": x, "b": 3 * x}) == 1  # those from before
