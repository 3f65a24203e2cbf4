"""Exiting by confidence: a number of each row beside a threshold.

Shapes: n rows, C classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradalign.errors import finite_number
from gradalign.multiexit.inference import Policy
from gradalign.multiexit.objectives import check_count


@dataclass(frozen=True)
class ConfidencePolicy(Policy):
    """Compare one number of each row, its score, with a threshold.

    A subclass is a frozen dataclass and writes ``score``, ``judge`` and, for ``calibrate``, ``settings``. What it
    knows of a row is the score alone, so that ``Calibrated`` can put a temperature before it.

    Args:
        threshold: tau >= 0, finite.

    Raises:
        TypeError: ``threshold`` is no number.
        ValueError: ``threshold`` is negative or not finite or, when called, C = 1.
    """

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

    @abstractmethod
    def judge(self, scores: Tensor, logits: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decide for the rows still there by their scores.

        Args:
            scores: (n,), float64.
            logits: (n, C), from which answers are taken, untouched.
            state: As in ``step``.

        Returns:
            What ``step`` returns: who leaves, (n,), bool, and the answers, (n, C).
        """

    def step(self, logits: Tensor, exit: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Judge the rows by the scores of their logits."""
        return self.judge(self.score(logits), logits, state)

    def _cuts(self, logits: Tensor) -> list[float]:
        """Return thresholds, ascending, that part the scores of ``logits`` in every possible way."""
        self.check(logits.shape[0], logits.shape[-1])
        values = self.score(logits).unique()
        middles = values[:-1] + values.diff() / 2
        # Between neighbouring floats there is no middle; the upper of the two parts them as well.
        middles = middles.where(middles > values[:-1], values[1:])
        return [0.0, *middles.tolist(), float(values[-1]) + 1]


@dataclass(frozen=True)
class Entropy(ConfidencePolicy):
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
        return _entropy(logits, self.normalized)

    def judge(self, scores: Tensor, logits: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Let rows of an entropy below the threshold leave."""
        return scores < self.threshold, logits

    def settings(self, logits: Tensor) -> tuple[str, Sequence[float]]:
        """Try every threshold that makes a difference; a small one is slow."""
        return "threshold", self._cuts(logits)


@dataclass(frozen=True)
class MaxProbability(ConfidencePolicy):
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

    def judge(self, scores: Tensor, logits: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Let rows leave with a probability at or above the threshold, each with its most confident answer.

        That is, for a row that leaves before the last exit, the answer of the exit where it leaves.
        """
        confidence, answers = scores, logits
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
class PatientConfidence(ConfidencePolicy):
    """Leave once so many exits in a row were sure (PCEE).

    A row's count starts at 0; at each exit it grows by 1 if the entropy there is below the threshold, else it
    returns to 0. The row leaves when the count is ``patience``, so at exit ``patience`` at the earliest, with that
    exit's answer; whether the exits agree on a label does not matter.

    Args:
        threshold: tau >= 0, finite; nats, or dimensionless if ``normalized``. 0 never leaves early.
        patience: At least 1; 1 is ``Entropy``, M or more never leaves early.
        normalized: Divide the entropy by ln C, so that it is in [0, 1], as the authors' code does.

    Raises:
        TypeError: ``threshold`` is no number, or ``patience`` no integer.
        ValueError: ``threshold`` is negative or not finite, ``patience`` is below 1 or, when called, C = 1.

    Note:
        Computed in float64, and 0 ln 0 counts as 0. The authors' code can also answer with a mean over exits, which
        is not offered.

    References:
        Zhang et al., PCEE-BERT: Accelerating BERT Inference via Patient and Confident Early Exiting, Findings of
        NAACL 2022.

    >>> logits = torch.tensor([[[9.0, 0.0]], [[0.0, 0.0]], [[9.0, 0.0]], [[0.0, 9.0]], [[9.0, 0.0]]])
    >>> PatientConfidence(0.5, patience=2)(logits)  # sure, unsure, sure, sure
    tensor([4])
    """

    patience: int
    normalized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("patience", self.patience)

    def score(self, logits: Tensor) -> Tensor:
        """Return the entropy, (..., C) -> (...), float64."""
        return _entropy(logits, self.normalized)

    def judge(self, scores: Tensor, logits: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Count the exits in a row that were sure, and let rows leave whose count is full."""
        before = state.get("count", torch.zeros_like(scores, dtype=torch.int64))
        state["count"] = (before + 1).where(scores < self.threshold, 0)
        return state["count"] == self.patience, logits

    def settings(self, logits: Tensor) -> tuple[str, Sequence[float]]:
        """Try every threshold that makes a difference; a small one is slow."""
        return "threshold", self._cuts(logits)


def _entropy(logits: Tensor, normalized: bool) -> Tensor:
    entropy: Tensor = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    return entropy / math.log(logits.shape[-1]) if normalized else entropy
