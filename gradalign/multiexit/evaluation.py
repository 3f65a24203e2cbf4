"""What a trained network is worth: every exit's accuracy, and every policy's at a wanted speed-up.

Shapes: M exits, N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradalign.multiexit import policies
from gradalign.multiexit.inference import Policy
from gradalign.multiexit.metrics import speed_up

_MOST_SETTINGS = 200


@dataclass(frozen=True)
class Outcome:
    """What a policy gives on test images.

    Attributes:
        policy: The calibrated policy.
        accuracy: Share of the rows that are answered right.
        speed_up: M N / sum of exits: layers saved, dimensionless.
        mac_speed_up: Multiply-accumulates of the network with its last exit alone, over those of the rows with all
            heads on their way.
    """

    policy: Policy
    accuracy: float
    speed_up: float
    mac_speed_up: float


def at_speed_up(
    policy: Policy, held_out: Tensor, test: Tensor, labels: Tensor, wanted: float, macs: Sequence[float]
) -> Outcome:
    """Return what a policy gives on test logits, calibrated on held-out logits to a wanted speed-up.

    Args:
        policy: Of the wanted kind.
        held_out: (M, N', C).
        test: (M, N, C).
        labels: (N,), of the test rows.
        wanted: Speed-up in layers.
        macs: (M,), multiply-accumulates up to each exit with all heads, and last those of the bare network.
    """
    return _outcome(policies.calibrate(policy, held_out, wanted), test, labels, macs)


def at_accuracy(
    policy: Policy,
    held_out: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    wanted: float,
    macs: Sequence[float],
) -> Outcome | None:
    """Return what the fastest setting gives that reaches an accuracy on held-out rows, None where none does.

    Of more than 200 settings 200 are tried, evenly spread from the fastest.

    Args:
        policy: Of the wanted kind.
        held_out: Logits (M, N', C) and labels (N',): the setting is chosen on these.
        test: Logits (M, N, C) and labels (N,): the outcome is measured on these.
        wanted: Accuracy, in [0, 1].
        macs: As in ``at_speed_up``.
    """
    logits, labels = held_out
    field, values = policy.settings(logits)
    stride = -(-len(values) // _MOST_SETTINGS)
    for value in values[::-1][::stride]:  # the fastest first
        candidate = replace(policy, **{field: value})
        if _accuracy(candidate.decide(logits).labels, labels) >= wanted:
            return _outcome(candidate, *test, macs)
    return None


def _outcome(policy: Policy, logits: Tensor, labels: Tensor, macs: Sequence[float]) -> Outcome:
    decision = policy.decide(logits)
    spent = torch.tensor(macs, dtype=torch.float64)[decision.exits - 1].sum()
    return Outcome(
        policy,
        _accuracy(decision.labels, labels),
        speed_up(decision.exits, len(logits)),
        macs[-1] * len(labels) / float(spent),
    )


def _accuracy(answers: Tensor, labels: Tensor) -> float:
    return float((answers == labels).double().mean())
