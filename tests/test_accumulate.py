from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gradalign import GradientAligner, rules
from tests import models

RULES = [rules.Sum(), rules.GASoft(0.3), rules.GAHard(0.3), rules.PCGrad()]


def losses_of(model, rows):
    hidden = torch.tanh(model.trunk(models.inputs(6, 5)[rows]))
    return {"first": model.first(hidden).square().mean(), "second": -(model.second(hidden).exp()).mean()}


def make(rule, **options):
    model = models.make(models.TwoHeads)
    return model, GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("scope", ["all", "shared"])
def test_micro_batches_equal_one_large_batch(rule, granularity, scope):
    model, whole = make(rule, granularity=granularity, scope=scope)
    whole.backward(losses_of(model, slice(0, 6)))
    expected = models.gradients(model)

    model, parts = make(rule, granularity=granularity, scope=scope)
    for _ in range(2):  # the second round finds the rows of the first
        parts.zero_grad()
        with parts.accumulate():
            for rows in (slice(0, 2), slice(2, 4)):
                parts.backward({k: v / 3 for k, v in losses_of(model, rows).items()})
                assert all(p.grad is None for p in model.parameters())
        parts.backward({k: v / 3 for k, v in losses_of(model, slice(4, 6)).items()})
        for name, parameter in model.named_parameters():
            if expected[name] is None:
                assert parameter.grad is None
            else:
                assert_close(parameter.grad, expected[name])
    assert_close(parts.report.gramian, whole.report.gramian, rtol=1e-5, atol=1e-8)  # of float32 gradients


def test_a_micro_batch_may_reach_other_parameters():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        losses = losses_of(model, slice(0, 3))
        optimizer.backward({"a": losses["first"], "b": losses["second"]})
    losses = losses_of(model, slice(3, 6))
    optimizer.backward({"a": losses["second"], "b": losses["first"]})
    plain = models.make(models.TwoHeads)
    (sum(losses_of(plain, slice(0, 3)).values()) + sum(losses_of(plain, slice(3, 6)).values())).backward()
    for name, expected in models.gradients(plain).items():
        actual = dict(model.named_parameters())[name].grad
        assert actual is None if expected is None else torch.allclose(actual, expected)


def test_a_parameter_that_only_an_early_micro_batch_reaches_keeps_its_part():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        optimizer.backward(losses_of(model, slice(0, 3)))
    optimizer.backward({name: model.trunk.weight.square().sum() for name in ("first", "second")})
    plain = models.make(models.TwoHeads)
    sum(losses_of(plain, slice(0, 3)).values()).backward()
    assert_close(model.second.weight.grad, plain.second.weight.grad)


def test_accumulation_can_be_nested():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        with optimizer.accumulate():
            optimizer.backward(losses_of(model, slice(0, 3)))
        optimizer.backward(losses_of(model, slice(3, 6)))
        assert model.trunk.weight.grad is None


def test_a_closure_that_leaves_micro_batches_waiting_is_refused():
    model, optimizer = make("sum")

    def closure():
        with optimizer.accumulate():
            optimizer.backward(losses_of(model, slice(0, 3)))
        return torch.tensor(1.0)

    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"must follow a backward outside accumulate"):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_closure_may_hold_the_last_micro_batch():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        optimizer.backward(losses_of(model, slice(0, 3)))

    def closure():
        losses = losses_of(model, slice(3, 6))
        optimizer.backward(losses)
        return sum(losses.values())

    optimizer.step(closure)
    plain = models.make(models.TwoHeads)
    for rows in (slice(0, 3), slice(3, 6)):
        sum(losses_of(plain, rows).values()).backward()
    assert_close(model.trunk.weight.grad, plain.trunk.weight.grad)
    assert not torch.equal(model.trunk.weight, plain.trunk.weight)


def test_loading_a_state_does_not_end_the_accumulation():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.backward(losses_of(model, slice(0, 3)))
        assert model.trunk.weight.grad is None


def test_zero_grad_drops_what_waits():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        optimizer.backward(losses_of(model, slice(0, 3)))
    optimizer.zero_grad()
    optimizer.backward(losses_of(model, slice(3, 6)))
    plain = models.make(models.TwoHeads)
    sum(losses_of(plain, slice(3, 6)).values()).backward()
    assert_close(model.trunk.weight.grad, plain.trunk.weight.grad)


def test_step_before_the_last_micro_batch_is_refused():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        optimizer.backward(losses_of(model, slice(0, 3)))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"step\(\) must follow a backward outside accumulate\(\), got 1 micro-batches"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_other_groups_while_micro_batches_wait_are_refused():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        optimizer.backward(losses_of(model, slice(0, 3)))
    losses = losses_of(model, slice(3, 6))
    with pytest.raises(
        ValueError, match=r"must keep the loss groups \['first', 'second'\] while micro-batches wait, got \['first'\]"
    ):
        optimizer.backward({"first": losses["first"]})


def test_other_parameters_while_micro_batches_wait_are_refused():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        optimizer.backward(losses_of(model, slice(0, 3)))
    model.first.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"parameters must stay the same while micro-batches wait"):
        optimizer.backward(losses_of(model, slice(3, 6)))


def test_an_error_in_a_micro_batch_spoils_the_sum_until_zero_grad():
    model, optimizer = make("sum")
    with optimizer.accumulate():
        optimizer.backward(losses_of(model, slice(0, 3)))
        spent = losses_of(model, slice(0, 3))
        spent["first"].backward(retain_graph=True)
        spent["second"].backward()
        model.zero_grad()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            optimizer.backward(spent)
    with pytest.raises(RuntimeError, match=r"earlier micro-batches were lost to an error inside accumulate\(\)"):
        optimizer.backward(losses_of(model, slice(3, 6)))
    with pytest.raises(RuntimeError, match=r"an error inside accumulate\(\) lost the gradients of the micro-batches"):
        optimizer.step()
    model.first.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"must stay the same while micro-batches wait"):
        optimizer.backward(losses_of(model, slice(3, 6)))
    model.first.weight.requires_grad_(True)
    optimizer.zero_grad()
    optimizer.backward(losses_of(model, slice(3, 6)))
    assert model.trunk.weight.grad is not None
