"""Save, load in a fresh process, go on: the same bits as without the stop."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from gradalign import GradientAligner, rules
from tests import models

# Hyper-parameters other than the defaults: those a rule cannot do without, and those that make it remember more.
HYPER_PARAMETERS = {
    "constant": {"weights": [0.7, 0.3, 0.2]},
    "ga-soft": {"anchor": "second"},
    "momentum-weights": {"rule": "gradvac"},
    "nash-mtl": {"update_every": 2},
    "olaux": {"horizon": 2, "rate": 0.1},
    "pcgrad": {"seed": 5},
    "sdmgrad": {"iterations": 3, "lr": 0.1},
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


def make(rule, **options):
    model = models.make(models.TwoHeads)
    return model, GradientAligner(torch.optim.AdamW(model.parameters(), lr=0.01), rule, **options)


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


def difference(one, two, where=""):
    """Where the first difference is, to the bit; None where there is none."""
    if type(one) is not type(two):
        return f"{where}: {type(one)} and {type(two)}"
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return f"{where}: {list(one)} and {list(two)}"
        return next(filter(None, (difference(one[key], two[key], f"{where}/{key}") for key in one)), None)
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return f"{where}: {one} and {two}"
        return next(
            filter(None, (difference(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(one, two, strict=True)))),
            None,
        )
    same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    return None if same else f"{where}: {one} and {two}"


def fresh_rule(name):
    return AverageWeights() if name == "average-weights" else rules.get(name, **HYPER_PARAMETERS.get(name, {}))


@pytest.mark.parametrize(
    ("name", "granularity"),
    [*itertools.product(rules.names(), ["global", "tensor"]), ("average-weights", "global")],
)
def test_same_bits_in_a_fresh_object(name, granularity, tmp_path):
    model, optimizer = make(fresh_rule(name), granularity=granularity)
    train(model, optimizer, 3, three_losses)
    save(tmp_path / "run.pt", model, optimizer)
    train(model, optimizer, 4, three_losses)

    again, resumed = make(fresh_rule(name), granularity=granularity)
    load(tmp_path / "run.pt", again, resumed)
    train(again, resumed, 4, three_losses)
    assert same_bits(model, again)


REMEMBERING = [name for name in rules.names() if fresh_rule(name).state_dict()]


@pytest.mark.parametrize("name", REMEMBERING)
def test_the_state_is_what_makes_the_bits_the_same(name, tmp_path):
    model, optimizer = make(fresh_rule(name))
    train(model, optimizer, 3, three_losses)
    save(tmp_path / "run.pt", model, optimizer)
    train(model, optimizer, 4, three_losses)

    again, resumed = make(fresh_rule(name))
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    del saved["optimizer"]["gradalign"]
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 4, three_losses)
    assert not same_bits(model, again)


@pytest.mark.parametrize("name", [name for name in REMEMBERING if fresh_rule(name).stateful])
def test_a_state_for_other_groups_is_refused_with_both_named(name):
    model, optimizer = make(fresh_rule(name))
    train(model, optimizer, 1, three_losses)
    renamed, other = make(fresh_rule(name))
    other.backward({key.upper(): loss for key, loss in three_losses(renamed).items()})
    both = r"\('FIRST', 'SECOND', 'THIRD'\), got 3 \('first', 'second', 'third'\)"
    with pytest.raises(ValueError, match=r"groups of `state` must be those that .* remembers, 3 groups " + both):
        other.load_state_dict(optimizer.state_dict())
    _, fresh = make(fresh_rule(name))
    fresh.load_state_dict(optimizer.state_dict())
    both = r"\('first', 'second', 'third'\), got 2 \('first', 'second'\)"
    with pytest.raises(ValueError, match=r"groups must be those that .* remembers, 3 groups " + both):
        fresh.backward(model.losses())


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
    own = small.state_dict()["gradalign"] | {"shapes": optimizer.state_dict()["gradalign"]["shapes"]}
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict({**small.state_dict(), "gradalign": own})
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
        ValueError, match=r"`state_dict` must hold \['groups', 'kept', 'rule', .* under 'gradalign', got \['rule'\]"
    ):
        optimizer.load_state_dict({**state, "gradalign": {"rule": "sum"}})
