"""What GLUE scores the answers by.

Shapes: M exits, N rows, C classes. Every score is in [-1, 1], none in per cent, and the larger the better.

Where a score is not defined it is 0: Matthews correlation when one class alone is answered, or occurs; Pearson and
Spearman correlation when all answers, or all labels, are equal; F1 when no row is answered or labelled positive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradalign.errors import missing_extra
from gradalign.multiexit.objectives import check_labels, check_logits
from gradalign.multiexit.text import tasks
from gradalign.multiexit.text.tasks import Task

try:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
except ImportError as error:
    raise missing_extra("scikit-learn", "text") from error


def score(task: str | Task, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return every score of a task at each exit.

    Args:
        task: The task or its name.
        logits: (M, N, C), floating, N >= 1; C = 1 for regression.
        labels: (N,), int64 in [0, C); floating for regression.

    Returns:
        By name, in the order of ``task.metrics``, each (M,), float64: "accuracy"; "matthews" too for CoLA; "f1" and
        "accuracy_and_f1", the mean of both, for MRPC and QQP; for STS-B "pearson", "spearman" and
        "pearson_and_spearman", the mean of both.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``labels`` of the wrong kind.
        ValueError: There is no such task, a shape is not as above, C is not the task's, there is no row, or an answer
            is not finite.
    """
    chosen = tasks.task(task)
    _, _, C = check_logits(logits)
    if chosen.num_classes != C:
        raise ValueError(f"`logits` must have {chosen.num_classes} classes for {chosen.name}, got {C}.")
    answers = logits.squeeze(2) if chosen.labels is None else logits.argmax(2)
    rows = [score_answers(chosen, row, labels) for row in answers.detach()]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in chosen.metrics}


def main(task: str | Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the one number that tables give of a task, (M,), float64: the last of ``score``."""
    return score(task, logits, labels)[tasks.task(task).main]


def score_answers(task: str | Task, answers: Tensor, labels: Tensor) -> dict[str, float]:
    """Return every score of answers, such as those of an exit policy.

    Args:
        task: The task or its name.
        answers: (N,), N >= 1: int64 class numbers; floating for regression.
        labels: (N,), alike.

    Returns:
        By name, as ``score``.

    Raises:
        TypeError: ``answers`` or ``labels`` is of the wrong kind.
        ValueError: There is no such task, a shape is not as above, there is no row, a class is not the task's, or an
            answer is not finite.

    >>> answers, labels = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 1, 1, 0])
    >>> score_answers("mrpc", answers, labels)  # F1 = 2 * 2 / (2 * 2 + 1)
    {'accuracy': 0.75, 'f1': 0.8, 'accuracy_and_f1': 0.775}
    """
    chosen = tasks.task(task)
    if answers.ndim != 1 or answers.shape != labels.shape or len(answers) == 0:
        raise ValueError(
            "`answers` and `labels` must be (N,), one for each row and at least one, got shapes"
            f" {tuple(answers.shape)} and {tuple(labels.shape)}."
        )
    if chosen.labels is None:
        _check_numbers("answers", answers)
        _check_numbers("labels", labels)
    else:
        check_labels(answers, len(labels), chosen.num_classes)
        check_labels(labels, len(labels), chosen.num_classes)
    given, right = answers.detach().cpu(), labels.cpu()
    found: dict[str, float] = {}
    for name in chosen.metrics:
        parts = name.split("_and_")
        found[name] = sum(found[part] for part in parts) / 2 if len(parts) == 2 else _SCORES[name](given, right)
    return found


def _check_numbers(name: str, numbers: Tensor) -> None:
    if not numbers.is_floating_point():
        raise TypeError(f"`{name}` must be floating for regression, got {numbers.dtype}.")
    if not numbers.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity; look at the losses of the run.")


def _accuracy(answers: Tensor, labels: Tensor) -> float:
    return float(accuracy_score(labels.numpy(), answers.numpy()))


def _f1(answers: Tensor, labels: Tensor) -> float:
    """Return the F1 of class 1."""
    return float(f1_score(labels.numpy(), answers.numpy(), zero_division=0.0))


def _matthews(answers: Tensor, labels: Tensor) -> float:
    if _constant(answers) or _constant(labels):  # scikit-learn warns where both are
        return 0.0
    return float(matthews_corrcoef(labels.numpy(), answers.numpy()))


def _pearson(answers: Tensor, labels: Tensor) -> float:
    if _constant(answers) or _constant(labels):
        return 0.0
    return float(torch.corrcoef(torch.stack([answers.double(), labels.double()]))[0, 1])


def _spearman(answers: Tensor, labels: Tensor) -> float:
    """Return the Pearson correlation of the ranks."""
    return _pearson(_ranks(answers), _ranks(labels))


def _ranks(numbers: Tensor) -> Tensor:
    """Return ranks from 1, (N,), float64; equal numbers share the mean of theirs."""
    _, place, counts = numbers.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)  # of c equal numbers the ranks are last - c + 1, ..., last
    ranks: Tensor = (last - (counts - 1) / 2).double()
    return ranks[place]


def _constant(numbers: Tensor) -> bool:
    return bool((numbers == numbers[0]).all())


_SCORES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
