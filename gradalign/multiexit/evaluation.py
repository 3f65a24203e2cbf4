"""What a trained network is worth with early exiting: every policy's score at a wanted speed-up or score.

Shapes: M exits, N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradalign.multiexit import policies
from gradalign.multiexit.inference import Policy
from gradalign.multiexit.metrics import speed_up

_MOST_SETTINGS = 200

Judge = Callable[[Tensor, Tensor], float]
"""Maps answers, (N,), and labels, (N,), to the score that runs are compared by."""

Rows = tuple[Tensor, Tensor]
"""Logits of every exit, (M, N, C), and labels, (N,)."""


@dataclass(frozen=True)
class Outcome:
    """What a policy gives on test rows.

    Attributes:
        policy: The calibrated policy.
        score: Of its answers, by the task's main metric.
        speed_up: M N / sum of exits: layers saved, dimensionless.
        mac_speed_up: Multiply-accumulates of the network with its last exit alone, over those of the rows with all
            heads on their way.
    """

    policy: Policy
    score: float
    speed_up: float
    mac_speed_up: float


def at_speed_up(
    policy: Policy, held_out: Tensor, test: Rows, wanted: float, costs: Sequence[float], judge: Judge
) -> Outcome:
    """Return what a policy gives on test rows, calibrated on held-out logits to a wanted speed-up.

    Args:
        policy: Of the wanted kind.
        held_out: (M, N', C).
        test: Logits (M, N, C) and labels (N,).
        wanted: Speed-up in layers.
        costs: (M + 1,), multiply-accumulates up to each exit with all heads, and last those of the bare network.
        judge: Scores the answers.
    """
    return outcome_of(policies.calibrate(policy, held_out, wanted), test, costs, judge)


def at_score(
    policy: Policy, held_out: Rows, test: Rows, wanted: float, costs: Sequence[float], judge: Judge
) -> Outcome | None:
    """Return what the fastest setting gives that reaches a score on held-out rows, None where none does.

    Of more than 200 settings 200 are tried, evenly spread from the fastest.

    Args:
        policy: Of the wanted kind.
        held_out: Logits (M, N', C) and labels (N',): the setting is chosen on these.
        test: Logits (M, N, C) and labels (N,): the outcome is measured on these.
        wanted: The score.
        costs: As in ``at_speed_up``.
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


def outcome_of(policy: Policy, test: Rows, costs: Sequence[float], judge: Judge) -> Outcome:
    """Return what a policy gives on test rows, as it is set."""
    logits, labels = test
    decision = policy.decide(logits)
    spent = torch.tensor(costs, dtype=torch.float64)[decision.exits - 1].sum()
    return Outcome(
        policy,
        judge(decision.labels, labels),
        speed_up(decision.exits, len(logits)),
        costs[-1] * len(labels) / float(spent),
    )
