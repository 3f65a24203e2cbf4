"""Checkpoints that do not fit: named, and nothing of them is loaded. The aligner's own state, alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from gradalign import GradientAligner, rules
from tests import models
from tests.test_resume import difference, fresh_rule, make, same_bits, three_losses, train


class Wider(models.TwoHeads):
    """A trunk of another shape."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(5, 6)


def trained(rule="momentum-weights", steps=2, losses=three_losses, **options):
    model, optimizer = make(fresh_rule(rule), **options)
    train(model, optimizer, steps, losses)
    return model, optimizer


def of_another_model(model):
    torch.manual_seed(2)
    optimizer = GradientAligner(torch.optim.AdamW(model.parameters(), lr=0.5), fresh_rule("momentum-weights"))
    return optimizer.state_dict()


def of_another_rule(name):
    return trained(name)[1].state_dict()


def of_other_groups():
    return trained(losses=models.TwoHeads.losses)[1].state_dict()


def with_own(**changed):
    state = trained()[1].state_dict()
    return {**state, "gradalign": {**state["gradalign"], **changed}}


BAD = {
    "None": (TypeError, r"`state_dict` must be a dictionary, got NoneType; pass what", lambda: None),
    "nothing": (ValueError, r"must hold the optimizer's 'state' and 'param_groups', got nothing; pass", dict),
    "a checkpoint around it": (
        ValueError,
        r"must hold the optimizer's 'state' and 'param_groups', got \['model', 'optimizer'\]",
        lambda: {"model": {}, "optimizer": {}},
    ),
    "the aligner's part alone": (
        ValueError,
        r"must hold the optimizer's 'state' and 'param_groups', got \['gradalign'\]",
        lambda: {"gradalign": trained()[1].state_dict()["gradalign"]},
    ),
    "no dictionary of its own": (
        ValueError,
        r"must hold \['groups', .* under 'gradalign', got 3; drop that key",
        lambda: {**trained()[1].state_dict(), "gradalign": 3},
    ),
    "another rule": (
        ValueError,
        r"must come from an aligner with the rule 'momentum-weights', got one with 'pcgrad'",
        lambda: of_another_rule("pcgrad"),
    ),
    "another averaged rule": (
        ValueError,
        r"`state` must average the weights of 'gradvac', got 'mgda'",
        lambda: with_own(rule_state=rules.MomentumWeights("mgda").state_dict()),
    ),
    "a rule's state that is none": (
        ValueError,
        r"must hold under 'gradalign' a dictionary as `rule_state`, got 3",
        lambda: with_own(rule_state=3),
    ),
    "more parameters": (
        ValueError,
        r"must come from an aligner of 7 parameters, got one of 9; make the model",
        lambda: of_another_model(nn.ModuleList([models.TwoHeads(), nn.Linear(2, 2)])),
    ),
    "parameters of another shape": (
        ValueError,
        r"aligner whose parameter 1 has the shape \[4, 5\], got one of \[6, 5\]; make the model",
        lambda: of_another_model(Wider()),
    ),
    "no shapes": (
        ValueError,
        r"must come from an aligner of 7 parameters, got one of None",
        lambda: with_own(shapes=None),
    ),
    "other parameter groups, saved by the bare optimizer": (
        ValueError,
        r"loaded state dict contains a parameter group that doesn't match the size",
        lambda: torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict(),
    ),
    "other loss groups": (
        ValueError,
        r"groups of `state` must be those that MomentumWeights remembers, 3 groups \('first', 'second', 'third'\), got"
        r" 2 \('first', 'second'\)",
        of_other_groups,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_does_not_fit_changes_nothing(case):
    error, message, state = BAD[case]
    model, optimizer = trained(update_every=3)
    bad = state()
    before = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    report, twin = optimizer.report, copy.deepcopy((model, optimizer))
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(bad)
    assert difference({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, before) is None
    assert optimizer.report is report
    train(model, optimizer, 3, three_losses)  # and it goes on
    train(*twin, 3, three_losses)
    assert same_bits(model, twin[0])


def test_other_loss_groups_after_loading_change_nothing():
    _, optimizer = trained()
    again, resumed = make(fresh_rule("momentum-weights"))
    resumed.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(ValueError, match=r"remembers, 3 groups \('first', 'second', 'third'\), got 2"):
        resumed.backward(again.losses())
    assert difference(resumed.state_dict(), before) is None
    assert all(p.grad is None for p in again.parameters())


@pytest.mark.parametrize(("saved_every", "every"), [(3, 5), (5, 3), (4, 1), (1, 4)])
def test_another_update_every_counts_from_the_last_alignment(saved_every, every):
    # Aligned at the first of two steps; another number asks for the next alignment once as many steps took its weights.
    model, optimizer = trained("pcgrad", update_every=saved_every)
    again, resumed = make(fresh_rule("pcgrad"), update_every=every)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    aligned = []
    for _ in range(every + 1):
        resumed.report = None
        train(again, resumed, 1, three_losses)
        aligned.append(resumed.report is not None)
    served = 2 if saved_every > 1 and every > 1 else every  # steps that the weights kept at the stop count
    assert aligned == [(step + served) % every == 0 for step in range(every + 1)]


def test_weights_are_not_kept_over_a_run_that_keeps_none():
    _, optimizer = trained("pcgrad", update_every=4)
    again, between = make(fresh_rule("pcgrad"))
    between.load_state_dict(optimizer.state_dict())
    train(again, between, 5, three_losses)
    last, resumed = make(fresh_rule("pcgrad"), update_every=4)
    resumed.load_state_dict(between.state_dict())
    train(last, resumed, 1, three_losses)
    assert resumed.report is not None  # and not the weights of six steps ago


def test_the_alignment_s_state_has_torch_s_protocol():
    _, optimizer = trained()
    assert isinstance(optimizer.alignment_state, Stateful)
    assert {key: type(value) for key, value in optimizer.alignment_state.state_dict().items()} == {"gradalign": bytes}


@pytest.mark.parametrize("name", rules.names())
def test_the_alignment_s_state_and_the_inner_optimizer_s_are_the_whole(name):
    options = {"update_every": 3} if isinstance(fresh_rule(name), rules.Rule) else {"granularity": "tensor"}
    model, optimizer = trained(name, **options)
    state, own = copy.deepcopy(optimizer.inner.state_dict()), optimizer.alignment_state.state_dict()
    again, resumed = make(fresh_rule(name), **options)
    again.load_state_dict(model.state_dict())
    resumed.alignment_state.load_state_dict(own)
    resumed.load_state_dict(state)  # as set_optimizer_state_dict does, after the alignment's or before
    train(model, optimizer, 4, three_losses)
    train(again, resumed, 4, three_losses)
    assert same_bits(model, again)
    assert difference(resumed.state_dict(), optimizer.state_dict()) is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, r"must hold bytes under 'gradalign', .* got NoneType"),
        ({}, r"must hold bytes under 'gradalign', .* got \[\]"),
        ("whole", r"must hold bytes under 'gradalign', .* got \['gradalign', 'param_groups', 'state'\]; for optimizer"),
        ("pcgrad", r"with the rule 'momentum-weights', got one with 'pcgrad'"),
        ("two groups", r"remembers, 3 groups \('first', 'second', 'third'\), got 2"),
    ],
)
def test_an_alignment_s_state_that_does_not_fit_changes_nothing(state, message):
    _, optimizer = trained(update_every=2)
    if state == "whole":
        state = optimizer.state_dict()
    elif state == "pcgrad":
        state = trained("pcgrad")[1].alignment_state.state_dict()
    elif state == "two groups":
        state = trained(losses=models.TwoHeads.losses)[1].alignment_state.state_dict()
    before, report = copy.deepcopy(optimizer.state_dict()), optimizer.report
    with pytest.raises(ValueError, match=message):
        optimizer.alignment_state.load_state_dict(state)
    assert difference(optimizer.state_dict(), before) is None
    assert optimizer.report is report


def test_micro_batches_that_wait_are_dropped():
    model, optimizer = trained()
    own = optimizer.alignment_state.state_dict()
    with optimizer.accumulate():
        optimizer.backward(three_losses(model))
    optimizer.alignment_state.load_state_dict(own)
    optimizer.step()  # an error while they wait
