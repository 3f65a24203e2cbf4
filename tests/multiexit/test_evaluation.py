from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from gradalign.multiexit import metrics, policies
from gradalign.multiexit.evaluation import POLICIES, REGRESSION, Costs, at_score, at_speed_up, policy_of


def logits_and_labels(seed, rows=60, exits=5, classes=3):
    """Exits that get surer and better with depth."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    noise = torch.randn(exits, rows, classes, generator=generator)
    depth = torch.arange(1, exits + 1).view(-1, 1, 1)
    return noise + 0.9 * depth * torch.nn.functional.one_hot(labels, classes), labels


COSTS = Costs((11, 22, 33, 44, 55), (1, 1, 1, 1))  # ten a layer, one a head, five that of the last


def accuracy(answers, labels):
    return float((answers == labels).double().mean())


@pytest.mark.parametrize("policy", [policies.Entropy(0.0), policies.MaxProbability(1.0), policies.Patience(1)])
@pytest.mark.parametrize("wanted", [1.5, 2.0])
def test_at_speed_up_is_the_calibrated_policy_on_test_rows(policy, wanted):
    held_out, _ = logits_and_labels(0)
    test, labels = logits_and_labels(1)
    outcome = at_speed_up(policy, held_out, (test, labels), wanted, COSTS, accuracy)
    assert outcome.policy == policies.calibrate(policy, held_out, wanted)
    decision = outcome.policy.decide(test)
    assert outcome.score == pytest.approx(float((decision.labels == labels).float().mean()))
    assert outcome.speed_up == metrics.speed_up(decision.exits, 5)
    # The bare network costs 51 a row; a row that left at exit m ran m layers and m heads.
    assert outcome.mac_speed_up == pytest.approx(51 * 60 / sum(11 * exit for exit in decision.exits.tolist()))


def test_heads_that_a_policy_does_not_look_at_cost_nothing():
    held_out, test = logits_and_labels(0), logits_and_labels(1)
    outcome = at_speed_up(policies.Budget(1), held_out[0], test, 5 / 3, COSTS, accuracy)
    assert outcome.policy == policies.Budget(3)
    assert outcome.mac_speed_up == pytest.approx(51 / 31)
    whole = at_speed_up(policies.Budget(1), held_out[0], test, 1.0, COSTS, accuracy)
    assert whole.mac_speed_up == 1.0


def test_policies_by_name():
    held_out = logits_and_labels(0)
    assert [type(policy_of(name, held_out)).__name__ for name in POLICIES[:5]] == [
        "Budget",
        "Patience",
        "Entropy",
        "MaxProbability",
        "PatientConfidence",
    ]
    for name in POLICIES[5:]:
        calibrated = policy_of(name, held_out)
        assert calibrated.policy == policy_of(name.removeprefix("calibrated-"), held_out)
        assert_close(torch.tensor(calibrated.temperatures).double(), policies.calibrate_temperatures(*held_out))
    with pytest.raises(ValueError, match=r"^`policy` must be .*patience.*, got 'hope'"):
        policy_of("hope", held_out)


def test_policies_of_regression_need_no_classes():
    steps = torch.tensor([0.0, 1.0, 1.05, 1.1])  # the second, third and fourth exit agree: rows leave at the third
    held_out = (steps.view(4, 1, 1).expand(4, 6, 1), torch.randn(6))
    costs = Costs((1, 2, 3, 4), (0, 0, 0))
    expected = {"budget": policies.Budget(2), "patience": policies.Patience(1, tolerance=0.1)}

    def judge(answers, labels):
        return -float((answers - labels).square().mean())

    for name in POLICIES:
        if name in REGRESSION:
            outcome = at_speed_up(policy_of(name, held_out), held_out[0], held_out, 2.0, costs, judge)
            assert outcome.policy == expected[name]
            assert outcome.speed_up == 4 * 6 / outcome.policy(held_out[0]).sum()
            assert outcome.score == judge(outcome.policy.decide(held_out[0]).labels, held_out[1])
        else:
            with pytest.raises(
                ValueError, match=f"^`policy` must be budget or patience for a regression, got '{name}'"
            ):
                policy_of(name, held_out)


def test_at_score_is_the_fastest_setting_that_is_good_enough_on_held_out_rows():
    held_out, test = logits_and_labels(0), logits_and_labels(1)
    wanted = float((held_out[0][-1].argmax(-1) == held_out[1]).double().mean())
    outcome = at_score(policies.Entropy(0.0), held_out, test, wanted, COSTS, accuracy)
    field, values = policies.Entropy(0.0).settings(held_out[0])
    good = [
        candidate
        for value in values
        if float(
            ((candidate := replace(policies.Entropy(0.0), **{field: value})).decide(held_out[0]).labels == held_out[1])
            .double()
            .mean()
        )
        >= wanted
    ]
    fastest = max(metrics.speed_up(candidate(held_out[0]), 5) for candidate in good)
    # Of the many thresholds every few are tried: within a step of the fastest.
    assert metrics.speed_up(outcome.policy(held_out[0]), 5) == pytest.approx(fastest, rel=0.03)
    assert outcome.policy in good
    assert outcome.speed_up > 1


def test_a_score_that_no_setting_reaches():
    held_out, test = logits_and_labels(0), logits_and_labels(1)
    assert at_score(policies.Patience(1), held_out, test, 1.01, COSTS, accuracy) is None


def test_the_score_is_the_judges():
    held_out, test = logits_and_labels(0), logits_and_labels(1)
    outcome = at_score(policies.Budget(1), held_out, test, 7.0, COSTS, lambda answers, labels: 7.0 + len(answers))
    assert outcome.policy == policies.Budget(1)  # the fastest, since each is good enough
    assert outcome.score == 67.0
