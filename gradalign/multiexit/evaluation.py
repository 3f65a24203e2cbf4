"""What a trained network is worth with early exiting: every policy's score at a wanted speed-up or score.

Shapes: M exits, N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from gradalign.errors import unknown_name
from gradalign.multiexit import policies
from gradalign.multiexit.inference import Policy
from gradalign.multiexit.metrics import speed_up

_MOST_SETTINGS = 200
_TOLERANCE = 0.1  # at which two exits agree in regression, in the unit of the labels
_CALIBRATED = "calibrated-"

_CONFIDENCE: Mapping[str, policies.ConfidencePolicy] = {
    "entropy": policies.Entropy(0.0),
    "max-probability": policies.MaxProbability(1.0),
    "patient-confidence": policies.PatientConfidence(0.0, patience=2),
}
REGRESSION = ("budget", "patience")
"""The policies that need no classes."""
POLICIES = (*REGRESSION, *_CONFIDENCE, *(_CALIBRATED + name for name in _CONFIDENCE))
"""All policies."""

Judge = Callable[[Tensor, Tensor], float]
"""Maps answers, (N,), and labels, (N,), to the score that runs are compared by."""

Rows = tuple[Tensor, Tensor]
"""Logits of every exit, (M, N, C), and labels, (N,)."""


def policy_of(name: str, held_out: Rows) -> Policy:
    """Return the policy of this name, yet to be set, for the exits and classes of held-out rows; C = 1 is regression.

    A calibrated one looks at logits divided by the temperatures that fit the held-out labels.

    Raises:
        ValueError: There is no such policy, or it needs classes and there is one output alone.
    """
    if name not in POLICIES:
        raise unknown_name("policy", name, POLICIES)
    logits, labels = held_out
    regression = logits.shape[-1] == 1
    if name == "budget":
        return policies.Budget(1)
    if name == "patience":
        return policies.Patience(1, tolerance=_TOLERANCE if regression else None)
    if regression:
        raise ValueError(f"`policy` must be {' or '.join(REGRESSION)} for a regression, got {name!r}.")
    if name in _CONFIDENCE:
        return _CONFIDENCE[name]
    temperatures = tuple(policies.calibrate_temperatures(logits, labels).tolist())
    return policies.Calibrated(_CONFIDENCE[name.removeprefix(_CALIBRATED)], temperatures)


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of a row.

    Attributes:
        exits: (M,), up to each exit, with all heads on the way.
        heads: (M - 1,), of each head before the last.
    """

    exits: Sequence[float]
    heads: Sequence[float]

    @property
    def bare(self) -> float:
        """Those of the network with its last exit alone."""
        return self.exits[-1] - sum(self.heads)

    def spent(self, policy: Policy, exits: Tensor) -> float:
        """Return those of rows, (N,), that left at these exits, with the heads that the policy looks at."""
        passed = [0.0 if policy.looks(exit) else head for exit, head in enumerate(self.heads, 1)]
        costs = [cost - saved for cost, saved in zip(self.exits, accumulate(passed, initial=0.0), strict=True)]
        return float(torch.tensor(costs, dtype=torch.float64)[exits - 1].sum())


@dataclass(frozen=True)
class Outcome:
    """What a policy gives on test rows.

    Attributes:
        policy: The calibrated policy.
        score: Of its answers, by the task's main metric.
        speed_up: M N / sum of exits: layers saved, dimensionless.
        mac_speed_up: Multiply-accumulates of the network with its last exit alone, over those of the rows with the
            heads that were asked.
    """

    policy: Policy
    score: float
    speed_up: float
    mac_speed_up: float


def at_speed_up(policy: Policy, held_out: Tensor, test: Rows, wanted: float, costs: Costs, judge: Judge) -> Outcome:
    """Return what a policy gives on test rows, calibrated on held-out logits to a wanted speed-up.

    Args:
        policy: Of the wanted kind.
        held_out: (M, N', C).
        test: Logits (M, N, C) and labels (N,).
        wanted: Speed-up in layers.
        costs: Of a test row.
        judge: Scores the answers.
    """
    return outcome_of(policies.calibrate(policy, held_out, wanted), test, costs, judge)


def at_score(policy: Policy, held_out: Rows, test: Rows, wanted: float, costs: Costs, judge: Judge) -> Outcome | None:
    """Return what the fastest setting gives that reaches a score on held-out rows, None where none does.

    Of more than 200 settings 200 are tried, evenly spread from the fastest.

    Args:
        policy: Of the wanted kind.
        held_out: Logits (M, N', C) and labels (N',): the setting is chosen on these.
        test: Logits (M, N, C) and labels (N,): the outcome is measured on these.
        wanted: The score.
        costs: Of a test row.
        judge: Scores the answers.
    """
    logits, labels = held_out
    field, values = policy.settings(logits)
    stride = -(-len(values) // _MOST_SETTINGS)
    for value in values[::-1][::stride]:  # the fastest first
        candidate = replace(policy, **{field: value})
        if judge(candidate.decide(logits).labels, labels) >= wanted:
            return outcome_of(candidate, test, costs, judge)
    return None


def outcome_of(policy: Policy, test: Rows, costs: Costs, judge: Judge) -> Outcome:
    """Return what a policy gives on test rows, as it is set."""
    logits, labels = test
    decision = policy.decide(logits)
    return Outcome(
        policy,
        judge(decision.labels, labels),
        speed_up(decision.exits, len(logits)),
        costs.bare * len(labels) / costs.spent(policy, decision.exits),
    )
