"""Setting a policy to a wanted speed-up."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import cache
from typing import TypeVar

from torch import Tensor

from gradalign.errors import finite_number
from gradalign.multiexit import metrics
from gradalign.multiexit.inference import Policy
from gradalign.multiexit.objectives import check_logits

PolicyT = TypeVar("PolicyT", bound=Policy)


def calibrate(policy: PolicyT, logits: Tensor, speed_up: float) -> PolicyT:
    """Return the policy of the same kind whose speed-up on held-out logits is nearest the wanted one.

    What is calibrated is the threshold, the patience or the exit, of a ``Calibrated`` policy those of the one inside,
    on logits divided by the temperatures; the other fields are kept. Every setting
    that makes a difference on ``logits`` counts; of two as near, and of several with the same speed-up, the
    slowest and safest is taken: the smallest entropy, the largest probability, the longest patience.

    Args:
        policy: Which kind; the value of its calibrated field does not matter.
        logits: (M, N, C), floating, N >= 1, without NaN: every exit's logits of rows not trained on.
        speed_up: Wanted M N / sum(exits), dimensionless, in [1, M].

    Returns:
        A new policy.

    Raises:
        TypeError: ``policy`` is no ``Policy``, ``logits`` no floating tensor, or ``speed_up`` no number.
        ValueError: ``logits`` is not (M, N, C), is empty or holds NaN, ``speed_up`` is outside [1, M], or the
            policy makes no sense for this M or C.
        NotImplementedError: The policy has no ``settings``.

    >>> from gradalign.multiexit.policies import Entropy
    >>> logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[3.0, 0.0], [3.0, 0.0]]])
    >>> policy = calibrate(Entropy(0.0), logits, speed_up=4 / 3)
    >>> policy(logits)  # 2 * 2 / (1 + 2)
    tensor([1, 2])
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"`policy` must be a policy, got {policy!r}; write Entropy(0.0), say.")
    M, N, _ = check_logits(logits)
    if N == 0 or logits.isnan().any():
        raise ValueError("`logits` must hold at least one row and no NaN to calibrate on.")
    wanted = finite_number("speed_up", speed_up, 1.0, M)
    field, values = policy.settings(logits)

    @cache
    def measured(value: object) -> float:
        return metrics.speed_up(replace(policy, **{field: value})(logits), M)

    # The speed-up never falls along the values, so the nearest is on one of the two sides of the wanted one;
    # ``min`` takes the first, the slower, of two as near, and the last search the slowest value with that
    # speed-up.
    after = bisect_left(values, wanted, key=measured)
    nearest = min(values[max(after - 1, 0) : after + 1], key=lambda value: abs(measured(value) - wanted))
    return replace(policy, **{field: values[bisect_left(values, measured(nearest), key=measured)]})
