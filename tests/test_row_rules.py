"""Rules of rows in the aligner: what they are handed, and what becomes of what they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close

from gradalign import GradAlignError, GradientAligner, rules
from tests import models
from tests.test_aligner import aligner, assert_same_gradients, plain_gradients

MAKE = {
    "bloop": rules.Bloop,
    "excess-mtl": rules.ExcessMTL,
    "graddrop": rules.GradDrop,
    "moco": rules.MoCo,
    "trimmed-mean": lambda: rules.TrimmedMean(trim=0),
}


@dataclass(frozen=True, eq=False)
class RowSum(rules.RowRule):
    """The sum, as a rule of rows."""

    name: ClassVar[str] = "row-sum"

    def _aligned(self, rows, names, block):
        return torch.stack(list(rows)).sum(0)

    def plain_weights(self, names):
        return (1.0,) * len(names)


@dataclass(frozen=True, eq=False)
class Broken(RowSum):
    """Makes something that is not finite of rows that are."""

    name: ClassVar[str] = "broken"

    def _aligned(self, rows, names, block):
        return torch.full_like(rows[0], torch.inf)


def test_every_row_rule_of_the_table_is_here():
    table = [name for name in rules.names() if name not in ("constant", "momentum-weights")]
    assert sorted(MAKE) == [name for name in table if isinstance(rules.get(name), rules.RowRule)]


@pytest.mark.parametrize("kind", models.ALL)
@pytest.mark.parametrize("granularity", ["global", "param_group", "tensor", "layers"])
@pytest.mark.parametrize("scope", ["all", "shared", "some"])
def test_the_sum_of_rows_equals_plain_backward(kind, granularity, scope):
    model = models.make(kind)
    blocks = [list(m.parameters()) for m in list(model.children())[:2]] if granularity == "layers" else granularity
    some = list(model.parameters())[:2] if scope == "some" else scope
    aligner(model, RowSum(), granularity=blocks, scope=some).backward(model.losses())
    assert_same_gradients(model, plain_gradients(kind))


def group_gradients(model):
    """For each loss its gradients, zeros where it reaches nothing; and which parameters any loss reaches."""
    parameters = list(model.parameters())
    rows = [
        torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True) for loss in model.losses().values()
    ]
    reached = [any(row[i] is not None for row in rows) for i in range(len(parameters))]
    dense = [[torch.zeros_like(p) if g is None else g for g, p in zip(row, parameters, strict=True)] for row in rows]
    return dense, reached


def aligned_by_hand(rule, dense, tensorwise):
    """The rule on raw gradients: each tensor alone, or all of them as one row."""
    if not tensorwise:
        rows = [torch.cat([g.flatten() for g in row]) for row in dense]
        sizes = [g.numel() for g in dense[0]]
        return [part.view_as(g) for part, g in zip(rule(rows).split(sizes), dense[0], strict=True)]
    return [rule([row[i].flatten() for row in dense], block=i).view_as(dense[0][i]) for i in range(len(dense[0]))]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_the_aligned_gradient_is_the_rules_on_raw_gradients(name, granularity):
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, MAKE[name](), granularity=granularity)
    by_hand = MAKE[name]()
    for _ in range(3):  # the memory goes on from step to step, for each block alone
        dense, reached = group_gradients(model)
        expected = aligned_by_hand(by_hand, dense, granularity == "tensor")
        optimizer.zero_grad()
        optimizer.backward(model.losses())
        for parameter, gradient, used in zip(model.parameters(), expected, reached, strict=True):
            assert (parameter.grad is not None) == used
            if used:
                assert_close(parameter.grad, gradient)
        optimizer.step()


def test_an_accumulated_batch_is_handed_over_once():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, rules.GradDrop(seed=3))
    with optimizer.accumulate():
        optimizer.backward({name: loss / 2 for name, loss in model.losses().items()})
    optimizer.backward({name: loss / 2 for name, loss in model.losses().items()})
    expected = aligned_by_hand(rules.GradDrop(seed=3), group_gradients(model)[0], tensorwise=False)
    assert_close(model.trunk.weight.grad, expected[list(dict(model.named_parameters())).index("trunk.weight")])


def test_the_report_has_a_gramian_and_no_weights():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, "graddrop")
    optimizer.backward(model.losses())
    assert optimizer.report.weights is None
    assert optimizer.report.reversals == 0
    assert optimizer.report.gramian.shape == (2, 2)
    assert repr(optimizer.report).startswith("AlignmentReport(first, second: weights none, conflicts")


def test_what_a_rule_makes_must_be_finite():
    model = models.make(models.TwoHeads)
    with pytest.raises(GradAlignError, match=r"The aligned gradient of Broken\(\) must be finite, got tensor\(\[inf"):
        aligner(model, Broken()).backward(model.losses())
    assert all(p.grad is None for p in model.parameters())
    aligner(model, Broken(), nonfinite="propagate").backward(model.losses())
    assert model.trunk.weight.grad.isinf().all()


def test_a_rule_that_makes_something_else_is_named():
    class Flat(RowSum):
        def _aligned(self, rows, names, block):
            return torch.stack(list(rows))

    class Listed(rules.Sum):
        def _weights(self, G, names):
            return [1.0, 1.0]

    class Nameless(rules.Rule):
        _weights = rules.Sum._weights
        plain_weights = rules.Sum.plain_weights

    J = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"`Flat._aligned` must return .* shape \(3,\), got one of shape \(2, 3\)"):
        Flat()(J)
    with pytest.raises(TypeError, match=r"`Listed._weights` must return a tensor of shape \(2,\), got list"):
        Listed()(J @ J.T)
    with pytest.raises(TypeError, match=r"`rule` must have a name, .* declare name: ClassVar\[str\] = .* in Nameless"):
        aligner(models.make(models.TwoHeads), Nameless())


def test_nan_goes_through_where_it_is_to_and_leaves_the_memory_healthy():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, rules.MoCo(), nonfinite="propagate")
    optimizer.backward(model.losses())
    before = optimizer.rule.state_dict()["memory"][0]
    optimizer.zero_grad()
    optimizer.backward({name: loss * torch.nan for name, loss in model.losses().items()})
    assert model.trunk.weight.grad.isnan().all()
    after = optimizer.rule.state_dict()["memory"][0]
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_parameters_that_come_later_do_not_fit_the_memory():
    model = models.make(models.TwoHeads)
    optimizer = GradientAligner(torch.optim.SGD(model.trunk.parameters(), lr=0.1), rules.MoCo())
    optimizer.backward(model.losses())
    optimizer.add_param_group({"params": list(model.first.parameters())})
    with pytest.raises(ValueError, match=r"`rows` must keep the 24 elements that MoCo remembers for block 0, got 39"):
        optimizer.backward(model.losses())


def test_a_skipped_step_has_no_weights_either():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, "graddrop", nonfinite="skip")
    optimizer.backward({name: loss * torch.nan for name, loss in model.losses().items()})
    assert optimizer.report.skipped
    assert optimizer.report.weights is None
