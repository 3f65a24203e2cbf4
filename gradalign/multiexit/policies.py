"""The exit policies, and how to set one to a wanted speed-up.

Shapes: M exits, N rows, C classes; stacked logits are (M, N, C), and one exit's logits of the n rows still
there are (n, C). Exits are counted from 1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from gradalign.errors import finite_number
from gradalign.multiexit import metrics
from gradalign.multiexit.inference import Decision, Policy
from gradalign.multiexit.objectives import check_count, check_logits

__all__ = ["Budget", "Decision", "Entropy", "MaxProbability", "Patience", "Policy", "calibrate"]

PolicyT = TypeVar("PolicyT", bound=Policy)


@dataclass(frozen=True)
class Budget(Policy):
    """Answer every row at one exit (budgeted exiting).

    Args:
        exit: 1 to M.

    Raises:
        TypeError: ``exit`` is no integer.
        ValueError: ``exit`` is below 1 or, when called, above M.

    >>> Budget(2)(torch.zeros(3, 4, 2))
    tensor([2, 2, 2, 2])
    """

    exit: int

    def __post_init__(self) -> None:
        check_count("exit", self.exit)

    def check(self, num_exits: int, num_classes: int) -> None:
        """Raise ValueError unless there is such an exit."""
        if self.exit > num_exits:
            raise ValueError(f"`exit` must be in 1..{num_exits}, the exits of this network, got {self.exit}.")

    def step(self, logits: Tensor, exit: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Let all rows leave at the exit, none before."""
        return logits.new_full(logits.shape[:1], exit == self.exit, dtype=torch.bool), logits

    def settings(self, logits: Tensor) -> tuple[str, Sequence[float]]:
        """Try every exit."""
        return "exit", range(len(logits), 0, -1)


@dataclass(frozen=True)
class _Thresholded(Policy):
    """What policies share that compare one number a row with a threshold."""

    threshold: float

    def __post_init__(self) -> None:
        finite_number("threshold", self.threshold, low=0.0)

    def check(self, num_exits: int, num_classes: int) -> None:
        """Raise ValueError for a single output, of which every exit is equally sure."""
        if num_classes == 1:
            raise ValueError(
                f"`logits` must have two classes or more for {type(self).__name__}, got one output; for"
                " regression take Patience(patience, tolerance)."
            )

    @abstractmethod
    def score(self, logits: Tensor) -> Tensor:
        """Return the number that is compared with the threshold, (..., C) -> (...), float64."""

    def _cuts(self, logits: Tensor) -> list[float]:
        """Return thresholds, ascending, that part the scores of ``logits`` in every possible way."""
        self.check(logits.shape[0], logits.shape[-1])
        values = self.score(logits).unique()
        middles = values[:-1] + values.diff() / 2
        # Between neighbouring floats there is no middle; the upper of the two parts them as well.
        middles = middles.where(middles > values[:-1], values[1:])
        return [0.0, *middles.tolist(), float(values[-1]) + 1]


@dataclass(frozen=True)
class Entropy(_Thresholded):
    """Leave at the first exit whose distribution has a small entropy: H(p) = -sum_c p_c ln p_c < threshold.

    Args:
        threshold: tau >= 0, finite; nats, or dimensionless if ``normalized``. 0 never leaves early.
        normalized: Divide the entropy by ln C, so that it is in [0, 1], as FastBERT does.

    Raises:
        TypeError: ``threshold`` is no number.
        ValueError: ``threshold`` is negative or not finite or, when called, C = 1.

    Note:
        Computed in float64, and 0 ln 0 counts as 0: the surest rows leave too.

    References:
        Xin et al., DeeBERT, ACL 2020, arXiv:2004.12993; Liu et al., FastBERT, ACL 2020, arXiv:2004.02178;
        Teerapittayanon et al., BranchyNet, ICPR 2016, arXiv:1709.01686.

    >>> logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0]], [[0.0, 0.0], [9.0, 0.0]]])
    >>> Entropy(0.5)(logits)  # ln 2 = 0.69 at both exits, 0.001
    tensor([2, 1])
    """

    normalized: bool = False

    def score(self, logits: Tensor) -> Tensor:
        """Return the entropy, (..., C) -> (...), float64."""
        entropy: Tensor = torch.special.entr(logits.double().softmax(-1)).sum(-1)
        return entropy / math.log(logits.shape[-1]) if self.normalized else entropy

    def step(self, logits: Tensor, exit: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Let rows of an entropy below the threshold leave."""
        return self.score(logits) < self.threshold, logits

    def settings(self, logits: Tensor) -> tuple[str, Sequence[float]]:
        """Try every threshold that makes a difference; a small one is slow."""
        return "threshold", self._cuts(logits)


@dataclass(frozen=True)
class MaxProbability(_Thresholded):
    """Leave at the first exit that gives a class a large probability: max_c p_c >= threshold.

    A row that no exit is sure of costs all M exits and gets the answer of the *most confident* one, the first
    of those that tie.

    Args:
        threshold: tau >= 0, finite, dimensionless. Above 1 never leaves early.

    Raises:
        TypeError: ``threshold`` is no number.
        ValueError: ``threshold`` is negative or not finite or, when called, C = 1.

    Note:
        Computed in float64. NaN logits count as probability 0.

    References:
        Kaya et al., Shallow-Deep Networks, ICML 2019, arXiv:1810.07052.

    >>> logits = torch.tensor([[[0.0, 3.0]], [[1.0, 0.0]]])  # max p = 0.95, then 0.73
    >>> MaxProbability(0.99).decide(logits)
    Decision(labels=tensor([1]), exits=tensor([2]), logits=tensor([[0., 3.]]))
    """

    def score(self, logits: Tensor) -> Tensor:
        """Return the largest probability, (..., C) -> (...), float64."""
        return logits.double().softmax(-1).amax(-1).nan_to_num(nan=0.0)

    def step(self, logits: Tensor, exit: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Let rows leave with a probability at or above the threshold, each with its most confident answer.

        That is, for a row that leaves before the last exit, the answer of the exit where it leaves.
        """
        confidence, answers = self.score(logits), logits
        leaves = confidence >= self.threshold
        if state:
            better = confidence > state["confidence"]
            confidence = confidence.where(better, state["confidence"])
            answers = answers.where(better.unsqueeze(-1), state["answers"])
        state.update(confidence=confidence, answers=answers)
        return leaves, answers

    def settings(self, logits: Tensor) -> tuple[str, Sequence[float]]:
        """Try every threshold that makes a difference; a large one is slow."""
        return "threshold", self._cuts(logits)[::-1]


@dataclass(frozen=True)
class Patience(Policy):
    """Leave once so many exits in a row have agreed with the one before.

    A row's count is 0 at exit 1; at exit i > 1 it grows by 1 if the exit's label is that of exit i - 1, else
    it returns to 0. The row leaves when the count is ``patience``, so at exit patience + 1 at the earliest.

    Args:
        patience: At least 1; M - 1 or more never leaves early.
        tolerance: For regression (C = 1), in the unit of the output: exits agree if abs(y_i - y_{i-1}) <
            tolerance.

    Raises:
        TypeError: ``patience`` is no integer, or ``tolerance`` no number.
        ValueError: ``patience`` is below 1, ``tolerance`` negative or not finite or, when called, C = 1
            without ``tolerance`` or C > 1 with it.

    References:
        Zhou et al., BERT Loses Patience: Fast and Robust Inference with Early Exit, NeurIPS 2020,
        arXiv:2006.04152.

    >>> labels = torch.tensor([[0, 1], [0, 0], [1, 0], [1, 0]])  # of 4 exits and 2 rows
    >>> Patience(2)(torch.nn.functional.one_hot(labels).float())
    tensor([4, 4])
    >>> Patience(1)(torch.nn.functional.one_hot(labels).float())
    tensor([2, 3])
    """

    patience: int
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_count("patience", self.patience)
        if self.tolerance is not None:
            finite_number("tolerance", self.tolerance, low=0.0)

    def check(self, num_exits: int, num_classes: int) -> None:
        """Raise ValueError unless ``tolerance`` is given for a single output and only then."""
        if (self.tolerance is None) == (num_classes == 1):
            got = f"{num_classes} classes" if num_classes > 1 else "one output, C = 1"
            raise ValueError(f"`tolerance` must be given for regression alone, got {self} and {got}.")

    def step(self, logits: Tensor, exit: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Count the exits in a row that agree, and let rows leave whose count is full."""
        said = logits.argmax(-1) if self.tolerance is None else logits.squeeze(-1).double()
        count = torch.zeros_like(said, dtype=torch.int64)
        if state:
            before = state["said"]
            agrees = said == before if self.tolerance is None else (said - before).abs() < self.tolerance
            count = (state["count"] + 1).where(agrees, 0)
        state.update(said=said, count=count)
        return count == self.patience, logits

    def settings(self, logits: Tensor) -> tuple[str, Sequence[float]]:
        """Try every patience up to the one that never leaves early."""
        return "patience", range(max(len(logits) - 1, 1), 0, -1)


def calibrate(policy: PolicyT, logits: Tensor, speed_up: float) -> PolicyT:
    """Return the policy of the same kind whose speed-up on held-out logits is nearest the wanted one.

    What is calibrated is the threshold, the patience or the exit; the other fields are kept. Every setting
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
    def measured(value: float) -> float:
        return metrics.speed_up(replace(policy, **{field: value})(logits), M)

    # The speed-up never falls along the values, so the nearest is on one of the two sides of the wanted one;
    # ``min`` takes the first, the slower, of two as near, and the last search the slowest value with that
    # speed-up.
    after = bisect_left(values, wanted, key=measured)
    nearest = min(values[max(after - 1, 0) : after + 1], key=lambda value: abs(measured(value) - wanted))
    return replace(policy, **{field: values[bisect_left(values, measured(nearest), key=measured)]})
