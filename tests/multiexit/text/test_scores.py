from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from gradalign.multiexit.text import scores

stats = pytest.importorskip("scipy.stats")


def logits_of(*exits, classes=2):
    """Logits whose largest entry is the given class at each exit and row."""
    return torch.nn.functional.one_hot(torch.tensor(exits), classes).float() * 3 - 1


# Hand-made: 6 rows, labels 1 1 1 1 0 0. Exit 1 answers 1 1 1 0 0 1: TP 3, FN 1, TN 1, FP 1. Exit 2 is right throughout.
LABELS = torch.tensor([1, 1, 1, 1, 0, 0])
BINARY = logits_of([1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0])
ACCURACY = 4 / 6
F1 = 6 / 8  # 2 TP / (2 TP + FP + FN)
MATTHEWS = (3 * 1 - 1 * 1) / math.sqrt((3 + 1) * (3 + 1) * (1 + 1) * (1 + 1))  # 2/8


def check(found, expected):
    assert list(found) == list(expected)
    for name, numbers in expected.items():
        assert_close(found[name], torch.tensor(numbers, dtype=torch.float64))


@pytest.mark.parametrize("name", ["sst-2", "qnli", "rte", "wnli"])
def test_accuracy(name):
    check(scores.score(name, BINARY, LABELS), {"accuracy": [ACCURACY, 1.0]})
    assert_close(scores.main(name, BINARY, LABELS), torch.tensor([ACCURACY, 1.0]).double(), rtol=0, atol=1e-7)


def test_cola():
    check(scores.score("cola", BINARY, LABELS), {"accuracy": [ACCURACY, 1.0], "matthews": [MATTHEWS, 1.0]})
    assert_close(scores.main("cola", BINARY, LABELS), torch.tensor([MATTHEWS, 1.0], dtype=torch.float64))
    assert scores.score_answers("cola", 1 - LABELS, LABELS)["matthews"] == -1


@pytest.mark.parametrize("name", ["mrpc", "QQP"])
def test_accuracy_and_f1(name):
    mean = (ACCURACY + F1) / 2
    expected = {"accuracy": [ACCURACY, 1.0], "f1": [F1, 1.0], "accuracy_and_f1": [mean, 1.0]}
    check(scores.score(name, BINARY, LABELS), expected)
    assert_close(scores.main(name, BINARY, LABELS), torch.tensor([mean, 1.0], dtype=torch.float64))


def test_three_classes():
    labels = torch.tensor([0, 1, 2, 2])
    check(scores.score("mnli", logits_of([0, 2, 2, 1], classes=3), labels), {"accuracy": [0.5]})


def test_regression_by_scipy_with_ties():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 26, (200,), generator=generator).float() / 5
    answers = labels + torch.randn(3, 200, generator=generator)
    answers[1] = answers[1].round()  # ties among the answers too
    answers[2] *= -1
    found = scores.score("sts-b", answers.unsqueeze(2), labels)
    pearson = [float(stats.pearsonr(row, labels.double())[0]) for row in answers.double()]
    spearman = [float(stats.spearmanr(row, labels.double())[0]) for row in answers.double()]
    mean = [(p + s) / 2 for p, s in zip(pearson, spearman, strict=True)]
    check(found, {"pearson": pearson, "spearman": spearman, "pearson_and_spearman": mean})
    assert_close(scores.main("sts-b", answers.unsqueeze(2), labels), torch.tensor(mean, dtype=torch.float64))
    assert spearman[2] < -0.5


def test_regression_by_hand():
    # answers and labels less their means: (-2, 0, 2) and (-1, 2, -1): product 0. Ranks 1 2 3 and 1.5 3 1.5: product 0.
    found = scores.score_answers("sts-b", torch.tensor([0.0, 2.0, 4.0]), torch.tensor([1.0, 4.0, 1.0]))
    assert found == pytest.approx({"pearson": 0, "spearman": 0, "pearson_and_spearman": 0}, abs=1e-12)
    # monotone, not linear: Pearson of (0, 1, 2) with (0, 1, 4): 4 / sqrt(2 * 26/3)
    found = scores.score_answers("stsb", torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 1.0, 2.0]))
    pearson = 4 / math.sqrt(2 * 26 / 3)
    assert found == pytest.approx({"pearson": pearson, "spearman": 1, "pearson_and_spearman": (1 + pearson) / 2})


@pytest.mark.parametrize("value", [0.1, 3.3, 0.0])
def test_constant_regression_scores_0(value):
    labels = torch.tensor([0.5, 1.0, 2.5])
    zero = {"pearson": 0.0, "spearman": 0.0, "pearson_and_spearman": 0.0}
    assert scores.score_answers("sts-b", torch.full((3,), value), labels) == zero
    assert scores.score_answers("sts-b", labels, torch.full((3,), value)) == zero


@pytest.mark.parametrize("answer", [0, 1])
@pytest.mark.parametrize("label", [None, 0, 1])
def test_one_class_alone(answer, label):
    labels = LABELS if label is None else torch.full((6,), label)
    answers = torch.full((6,), answer)
    right = float((answers == labels).double().mean())
    assert scores.score_answers("cola", answers, labels) == {"accuracy": right, "matthews": 0.0}
    positives = int(labels.sum())
    f1 = 2 * positives / (positives + 6) if answer else 0.0
    assert scores.score_answers("mrpc", answers, labels) == pytest.approx(
        {"accuracy": right, "f1": f1, "accuracy_and_f1": (right + f1) / 2}
    )


def test_answers_score_as_the_logits_that_give_them():
    for name in ("cola", "mrpc", "sst-2"):
        every = scores.score(name, BINARY, LABELS)
        for exit, answers in enumerate(BINARY.argmax(2)):
            found = scores.score_answers(name, answers, LABELS)
            assert found == {metric: float(column[exit]) for metric, column in every.items()}


def test_half_precision_and_gradients_are_no_hindrance():
    check(scores.score("cola", BINARY.bfloat16(), LABELS), {"accuracy": [ACCURACY, 1.0], "matthews": [MATTHEWS, 1.0]})
    numbers = torch.tensor([[[1.0], [2.0], [4.0]]], requires_grad=True)
    labels = torch.tensor([1.0, 2.0, 4.0])
    assert_close(scores.main("sts-b", numbers, labels), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scores.score("mnli", BINARY, LABELS), ValueError, "`logits` must have 3 classes for mnli, got 2"),
        (lambda: scores.score("sts-b", BINARY, LABELS), ValueError, "`logits` must have 1 classes for sts-b, got 2"),
        (lambda: scores.score("cola", BINARY[0], LABELS), ValueError, r"`logits` must be \(exits, rows, classes\)"),
        (
            lambda: scores.score("cola", BINARY, LABELS[:5]),
            ValueError,
            r"must be \(N,\), .* got shapes \(6,\) and \(5,\)",
        ),
        (lambda: scores.score("cola", BINARY[:, :0], LABELS[:0]), ValueError, "one for each row and at least one"),
        (lambda: scores.score("cola", BINARY, LABELS * 2), ValueError, "`labels` must be in 0..1, got 0 to 2"),
        (lambda: scores.score("cola", BINARY, LABELS.float()), TypeError, "`labels` must be integer class numbers"),
        (lambda: scores.score("sts-b", BINARY[..., :1], LABELS), TypeError, "`labels` must be floating for regression"),
        (
            lambda: scores.score_answers("sts-b", torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])),
            ValueError,
            "`answers` must be finite, got NaN or infinity",
        ),
        (lambda: scores.main("cole", BINARY, LABELS), ValueError, "`task` must be one of .* did you mean 'cola'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
