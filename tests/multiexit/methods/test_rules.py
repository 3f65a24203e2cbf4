from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gradalign import GradientAligner, rules
from gradalign.multiexit import methods
from gradalign.multiexit.methods import Settings, Step
from tests.multiexit.methods.small import batch, random_logits, small

DEFAULTS = Settings()


def trained(name, settings=DEFAULTS, steps=3):
    """Return parameters before and after some steps."""
    model, (inputs, labels) = small(4), batch()
    (stage,) = methods.get(name).stages
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.01), stage.rule(settings))
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(stage.objective(Step(stage.forward(model, inputs, settings), labels, settings)))
        optimizer.step()
    return before, list(model.parameters()), optimizer


def test_the_names_are_those_of_all_rules_that_go_together():
    expected = [f"kd:{rule}" for rule in rules.names() if rule not in ("krum", "trimmed-mean")]
    expected += [f"exits:{rule}" for rule in rules.names() if rule != "constant"]
    assert methods.rule_names() == expected


@pytest.mark.parametrize("name", methods.rule_names())
def test_every_rule_trains(name):
    before, after, _ = trained(name)
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("name", [name for name in methods.rule_names() if name.startswith("exits:")])
def test_the_last_exit_is_the_anchor(name):
    rule = methods.get(name).stages[0].rule(Settings())
    if hasattr(rule, "anchor"):
        assert rule.anchor_index(4, ("exit1", "exit2", "exit3", "exit4")) == 3
    groups = trained(name, steps=1)[2].report.names
    assert groups == ("exit1", "exit2", "exit3", "exit4")


@pytest.mark.parametrize("name", [name for name in methods.rule_names() if name.startswith("kd:")])
def test_the_cross_entropy_is_the_anchor(name):
    rule = methods.get(name).stages[0].rule(Settings())
    assert getattr(rule, "anchor", "ce") == "ce"
    assert trained(name, steps=1)[2].report.names == ("ce", "kd")


def test_one_group_an_exit_sums_to_eq_1():
    logits, labels = random_logits(), torch.arange(5) % 4
    losses = methods.get("exits:sum").stages[0].objective(Step(logits, labels))
    assert list(losses) == ["exit1", "exit2", "exit3"]
    for m, loss in enumerate(losses.values(), 1):
        assert_close(loss, m * F.cross_entropy(logits[m - 1], labels) / 6)
    for one, two in zip(trained("exits:sum")[1], trained("joint")[1], strict=True):
        assert_close(one, two)


@pytest.mark.parametrize(
    ("by_rule", "named"), [("kd:constant", "ml"), ("kd:ga-soft", "gaml-soft"), ("kd:ga-hard", "gaml-hard")]
)
def test_named_methods_are_the_same(by_rule, named):
    settings = Settings(alpha=0.7, temperature=2.0, reduction="sum", clamp=True, full_step=False)
    for one, two in zip(trained(by_rule, settings)[1], trained(named, settings)[1], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("form", ["kd", "exits"])
def test_alpha_goes_where_it_means_the_auxiliaries_weight(form):
    settings = Settings(alpha=0.45)
    for name in rules.names():
        if f"{form}:{name}" not in methods.rule_names():
            continue
        rule = methods.get(f"{form}:{name}").stages[0].rule(settings)
        given = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}.get("alpha")
        if name in ("ga-soft", "ga-hard", "anchored-pcgrad"):
            assert given == 0.45
        else:
            assert given in (None, 2.0)  # FairGrad's own


def test_each_call_makes_a_rule_of_its_own():
    (stage,) = methods.get("kd:momentum-weights").stages
    one, two = stage.rule(Settings()), stage.rule(Settings())
    one(torch.eye(2))
    assert one.state_dict()["memory"]
    assert not two.state_dict()["memory"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kd:pc-grad", r"`rule` must be one of .* got 'pc-grad'; did you mean 'pcgrad'"),
        ("exit:pcgrad", r"`method` must be one of 'kd:RULE', 'exits:RULE', got 'exit:pcgrad'"),
        ("kd:", r"`rule` must be one of .* got ''"),
        ("kd:krum", r"`Krum` must have at least 3 loss groups, got 2 \('ce', 'kd'\).* take exits:krum"),
        ("kd:trimmed-mean", r"`TrimmedMean` must have more than 2 loss groups.* take exits:trimmed-mean"),
        ("exits:constant", r"`rule` must have a weight for each exit.* take exits:sum"),
    ],
)
def test_what_does_not_go_together(name, message):
    with pytest.raises(ValueError, match=message):
        methods.get(name)


def test_groups_too_few_for_the_rule_are_said_by_the_rule():
    model, (inputs, labels) = small(2), batch()
    (stage,) = methods.get("exits:krum").stages
    optimizer = GradientAligner(torch.optim.SGD(model.parameters()), stage.rule(Settings()))
    with pytest.raises(ValueError, match="`Krum` must have at least 3 loss groups, got 2"):
        optimizer.backward(stage.objective(Step(model(**inputs), labels)))
