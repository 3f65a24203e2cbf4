import dataclasses
import json

import pytest

from gradalign.multiexit.policies import (
    Budget,
    Calibrated,
    Entropy,
    MaxProbability,
    Patience,
    PatientConfidence,
    from_dict,
    to_dict,
)


@pytest.mark.parametrize(
    ("policy", "stored"),
    [
        (Budget(3), {"name": "Budget", "exit": 3}),
        (Entropy(0.1 + 0.2), {"name": "Entropy", "threshold": 0.1 + 0.2, "normalized": False}),
        (MaxProbability(1 / 3), {"name": "MaxProbability", "threshold": 1 / 3}),
        (Patience(4), {"name": "Patience", "patience": 4, "tolerance": None}),
        (Patience(1, 0.5), {"name": "Patience", "patience": 1, "tolerance": 0.5}),
        (
            PatientConfidence(0.7, 2, normalized=True),
            {"name": "PatientConfidence", "threshold": 0.7, "patience": 2, "normalized": True},
        ),
        (
            Calibrated(MaxProbability(0.9), (1 / 3, 2.0)),
            {
                "name": "Calibrated",
                "policy": {"name": "MaxProbability", "threshold": 0.9},
                "temperatures": [1 / 3, 2.0],
            },
        ),
    ],
)
def test_round_trip_through_json(policy, stored):
    assert to_dict(policy) == stored
    again = from_dict(json.loads(json.dumps(to_dict(policy))))
    assert again == policy
    assert type(again) is type(policy)


def test_defaults_may_be_left_out():
    assert from_dict({"name": "Entropy", "threshold": 0.3}) == Entropy(0.3)


def test_the_mapping_is_left_alone():
    stored = to_dict(Calibrated(Entropy(0.3), (1.0,)))
    before = json.dumps(stored)
    from_dict(stored)
    assert json.dumps(stored) == before


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ({"name": "Entropie", "threshold": 0.3}, ValueError, r"`name` must be one of 'Budget', .*mean 'Entropy'"),
        ({"threshold": 0.3}, ValueError, r"`name` must be one of 'Budget', .*got None"),
        ({"name": ["Entropy"]}, ValueError, r"`name` must be one of 'Budget', .*got \['Entropy'\]"),
        (
            {"name": "Entropy", "treshold": 0.3},
            ValueError,
            r"fields of Entropy, 'threshold', 'normalized', got 'treshold'; look at 'treshold'",
        ),
        ({"name": "PatientConfidence", "threshold": 0.3}, ValueError, r"got 'threshold'; look at 'patience'"),
        ({"name": "Budget"}, ValueError, r"fields of Budget, 'exit', got none; look at 'exit'"),
        ({"name": "Budget", "exit": 0}, ValueError, r"`exit` must be at least 1, got 0"),
        ({"name": "Entropy", "threshold": 0.3, "normalized": "no"}, TypeError, r"`normalized` must be true or false"),
        ({"name": "Calibrated", "policy": 3, "temperatures": [1.0]}, TypeError, r"`mapping` must be a mapping .*got 3"),
        (
            {"name": "Calibrated", "policy": {"name": "Budget", "exit": 1}, "temperatures": [1.0]},
            TypeError,
            r"`policy` must be a policy of confidence",
        ),
        ([("name", "Entropy")], TypeError, r"`mapping` must be a mapping as to_dict makes it, got \["),
    ],
)
def test_refuses(mapping, error, message):
    with pytest.raises(error, match=message):
        from_dict(mapping)


def test_a_policy_of_your_own_is_not_stored():
    @dataclasses.dataclass(frozen=True)
    class Own(Entropy):
        pass

    for policy in (Own(0.3), Entropy, None):
        with pytest.raises(TypeError, match=r"`policy` must be one of gradalign's, 'Budget', .*of your own yourself"):
            to_dict(policy)
