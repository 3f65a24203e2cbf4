"""Save, load in a fresh process, go on: the same bits as without the stop."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from gradalign import GradientAligner, rules
from tests import models

RULES = {
    "sum": rules.Sum(),
    "mean": rules.Mean(),
    "constant": rules.Constant([0.7, 0.3]),
    "ga-soft": rules.GASoft(0.3, anchor="second"),
    "ga-hard": rules.GAHard(0.3),
    "pcgrad": rules.PCGrad(seed=5),
}


@dataclass(frozen=True, eq=False)
class AverageWeights(rules.Rule):
    """PCGrad's weights averaged over the steps: a rule that remembers, as users may write one."""

    memory: list = field(default_factory=list, repr=False)

    name: ClassVar[str] = "average-weights"
    stateful: ClassVar[bool] = True

    def _weights(self, G, names):
        now = 1 + (-G[..., 0, 1]).clamp(min=0).unsqueeze(-1) / G.diagonal(dim1=-2, dim2=-1)
        self.memory[:] = [now if not self.memory else 0.9 * self.memory[0] + 0.1 * now]
        return self.memory[0]

    def plain_weights(self, names):
        return (1.0,) * len(names)

    def state_dict(self):
        return {"memory": list(self.memory)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.memory[:] = state["memory"]


def make(rule):
    model = models.make(models.TwoHeads)
    return model, GradientAligner(torch.optim.AdamW(model.parameters(), lr=0.01), rule)


def three_losses(model):
    losses = model.losses()
    return {**losses, "third": -sum(losses.values()).square()}


def train(model, optimizer, steps, losses=models.TwoHeads.losses):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(losses(model))
        optimizer.step()


def save(path, model, optimizer):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def load(path, model, optimizer):
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


def same_bits(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("rule", [*RULES, "average-weights"])
def test_same_bits_in_a_fresh_object(rule, tmp_path):
    def fresh():
        return AverageWeights() if rule == "average-weights" else rules.get(rule, **vars_of(RULES[rule]))

    losses = three_losses if rule == "pcgrad" else models.TwoHeads.losses  # with three groups the draws matter
    model, optimizer = make(fresh())
    train(model, optimizer, 3, losses)
    save(tmp_path / "run.pt", model, optimizer)
    train(model, optimizer, 4, losses)

    again, resumed = make(fresh())
    load(tmp_path / "run.pt", again, resumed)
    train(again, resumed, 4, losses)
    assert same_bits(model, again)


def vars_of(rule):
    return {key: value for key, value in vars(rule).items() if not key.startswith("_")}


def test_every_rule_in_the_table_is_resumed():
    assert sorted(RULES) == rules.names()


SECOND_PROCESS = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from gradalign import rules
from tests.test_resume import load, make, save, three_losses, train
torch.set_num_threads(1)
model, optimizer = make(rules.PCGrad(seed=5))
load(sys.argv[1], model, optimizer)
train(model, optimizer, 4, three_losses)
save(sys.argv[1], model, optimizer)
"""


def test_same_bits_in_a_fresh_process(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, optimizer = make(rules.PCGrad(seed=5))
        train(model, optimizer, 3, three_losses)
        save(tmp_path / "run.pt", model, optimizer)
        train(model, optimizer, 4, three_losses)
    finally:
        torch.set_num_threads(threads)
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, str(tmp_path / "run.pt"), str(root)], check=True, cwd=tmp_path
    )
    again, resumed = make(rules.PCGrad(seed=5))
    load(tmp_path / "run.pt", again, resumed)
    assert same_bits(model, again)
    assert torch.equal(
        resumed.state_dict()["gradalign"]["rule_state"]["generator"],
        optimizer.state_dict()["gradalign"]["rule_state"]["generator"],
    )


def test_skipped_steps_are_remembered():
    model, _ = make("sum")
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum", nonfinite="skip")
    optimizer.backward({"a": model.losses()["first"] * torch.nan})
    _, fresh = make("sum")
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.skipped_steps == 1


def test_a_state_of_another_rule_is_refused_and_nothing_is_loaded():
    model, optimizer = make("pcgrad")
    train(model, optimizer, 2)
    other, fresh = make("ga-soft")
    with pytest.raises(ValueError, match=r"must come from an aligner with the rule 'ga-soft', got one with 'pcgrad'"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state
    assert same_bits(other, models.make(models.TwoHeads))


def test_a_state_with_bad_values_leaves_everything_as_it_was():
    model, optimizer = make("pcgrad")
    train(model, optimizer, 2)
    before, report = optimizer.rule.state_dict()["generator"], optimizer.report
    state = optimizer.state_dict()
    other = {**state["gradalign"], "rule_state": rules.PCGrad(seed=9).state_dict(), "groups": 3}
    with pytest.raises(
        ValueError, match=r"`state_dict` must hold under 'gradalign' a list of `groups` or None .* got 3"
    ):
        optimizer.load_state_dict({**state, "gradalign": other})
    assert torch.equal(optimizer.rule.state_dict()["generator"], before)
    assert optimizer.report is report


def test_a_state_that_does_not_fit_the_inner_optimizer_leaves_the_rule_as_it_was():
    model, optimizer = make("pcgrad")
    train(model, optimizer, 2)
    before = optimizer.rule.state_dict()["generator"]
    small = GradientAligner(torch.optim.AdamW([model.trunk.weight]), "pcgrad")
    small.rule._generator.manual_seed(99)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(small.state_dict())
    assert torch.equal(optimizer.rule.state_dict()["generator"], before)


def test_groups_that_change_under_a_stateful_rule_are_refused():
    model, optimizer = make(AverageWeights())
    train(model, optimizer, 1)
    losses = model.losses()
    before = models.gradients(model)
    with pytest.raises(
        ValueError,
        match=r"`losses` must keep the loss groups \['first', 'second'\] under"
        r" AverageWeights\(\), which remembers them, got \['first', 'kd'\]",
    ):
        optimizer.backward({"first": losses["first"], "kd": losses["second"]})
    for name, gradient in models.gradients(model).items():
        assert gradient is None if before[name] is None else torch.equal(gradient, before[name])


def test_groups_other_than_the_saved_ones_are_refused_under_a_stateful_rule():
    model, optimizer = make(AverageWeights())
    train(model, optimizer, 1)
    again, resumed = make(AverageWeights())
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"must keep the loss groups \['first', 'second'\]"):
        resumed.backward({"only": again.losses()["first"]})


def test_a_state_with_other_keys_is_refused():
    _, optimizer = make("sum")
    state = optimizer.state_dict()
    with pytest.raises(
        ValueError, match=r"`state_dict` must hold \['groups', 'rule', .* under 'gradalign', got \['rule'\]"
    ):
        optimizer.load_state_dict({**state, "gradalign": {"rule": "sum"}})
