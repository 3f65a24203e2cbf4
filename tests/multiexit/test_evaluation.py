from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gradalign.multiexit import metrics, policies
from gradalign.multiexit.evaluation import at_score, at_speed_up


def logits_and_labels(seed, rows=60, exits=5, classes=3):
    """Exits that get surer and better with depth."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    noise = torch.randn(exits, rows, classes, generator=generator)
    depth = torch.arange(1, exits + 1).view(-1, 1, 1)
    return noise + 0.9 * depth * torch.nn.functional.one_hot(labels, classes), labels


COSTS = (10, 20, 30, 40, 50, 45)


def accuracy(answers, labels):
    return float((answers == labels).double().mean())


@pytest.mark.parametrize(
    "policy", [policies.Budget(1), policies.Entropy(0.0), policies.MaxProbability(1.0), policies.Patience(1)]
)
@pytest.mark.parametrize("wanted", [1.5, 2.0])
def test_at_speed_up_is_the_calibrated_policy_on_test_rows(policy, wanted):
    held_out, _ = logits_and_labels(0)
    test, labels = logits_and_labels(1)
    outcome = at_speed_up(policy, held_out, (test, labels), wanted, COSTS, accuracy)
    assert outcome.policy == policies.calibrate(policy, held_out, wanted)
    decision = outcome.policy.decide(test)
    assert outcome.score == pytest.approx(float((decision.labels == labels).float().mean()))
    assert outcome.speed_up == metrics.speed_up(decision.exits, 5)
    # The bare network costs 45 a row; a row that left at exit m cost COSTS[m - 1].
    assert outcome.mac_speed_up == pytest.approx(45 * 60 / sum(COSTS[exit - 1] for exit in decision.exits.tolist()))


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
