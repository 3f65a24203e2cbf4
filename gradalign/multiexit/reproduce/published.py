"""The figures that the GAML-BERT paper prints, to stand beside ours: Zhu et al., EMNLP 2021, with 12 layers of BERT.

Scores are per cent; a missing one is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst-2")


def _row(speed_up: float, *scores: float) -> tuple[float, dict[str, float]]:
    return speed_up, dict(zip(_TASKS, scores, strict=True))


TABLE2: Mapping[str, tuple[float, dict[str, float]]] = {
    "single": _row(1.00, 54.7, 83.5, 88.2, 86.8, 88.7, 67.1, 91.5),
    "bert-6l": _row(1.96, 36.4, 77.1, 83.9, 80.2, 84.8, 60.3, 88.6),
    "distilbert": _row(1.96, 46.5, 79.8, 85.3, 82.2, 86.4, 63.1, 89.3),
    "bert-pkd": _row(1.96, 47.4, 80.6, 85.5, 82.5, 86.8, 63.4, 89.7),
    "layerdrop": _row(1.96, 43.2, 80.1, 85.2, 81.7, 86.2, 62.8, 89.1),
    "theseus": _row(1.96, 44.5, 80.7, 85.4, 82.4, 86.5, 63.6, 89.6),
    "deebert": _row(1.88, 43.4, 81.2, 85.8, 82.5, 87.3, 63.9, 90.0),
    "shallow-deep": _row(1.95, 44.5, 81.1, 85.7, 82.6, 87.2, 64.1, 90.1),
    "joint": _row(1.91, 45.2, 81.5, 86.2, 83.1, 87.5, 64.5, 90.5),
    "fastbert": _row(1.93, 48.6, 82.1, 86.7, 83.6, 88.1, 64.9, 90.8),
    "fastbert-ga": _row(1.95, 50.4, 82.6, 87.5, 84.7, 88.5, 66.2, 91.4),
    "ml": _row(1.96, 49.2, 82.7, 87.3, 84.2, 88.6, 65.7, 91.3),
    "gaml-hard": _row(1.95, 50.5, 83.1, 87.6, 84.9, 88.9, 66.3, 91.5),
    "gaml-soft": _row(1.95, 51.1, 83.2, 88.1, 85.1, 89.1, 66.8, 91.9),
}
"""Method to speed-up and scores on the development sets."""

TABLE1: Mapping[tuple[str, int, str], tuple[float, float, float, float]] = {
    ("sst-2", 1, "early"): (56.4, 61.5, 74.6, 75.8),
    ("sst-2", 1, "last"): (91.5, 91.6, 91.3, 91.5),
    ("sst-2", 6, "early"): (88.6, 88.9, 89.3, 89.6),
    ("sst-2", 6, "last"): (91.5, 91.8, 92.0, 92.2),
    ("cola", 1, "early"): (0.0, 0.0, 0.0, 0.0),
    ("cola", 1, "last"): (54.7, 55.0, 55.1, 55.3),
    ("cola", 6, "early"): (36.4, 39.9, 46.5, 47.6),
    ("cola", 6, "last"): (54.7, 55.4, 55.9, 56.7),
}
"""Task, early exit of 12 and which of the pair, to the scores trained directly, jointly, with one-way distillation
towards that exit, and mutually."""

TABLE3: Mapping[tuple[str, float], float] = {
    ("ml", 0.1): 48.8,
    ("ml", 0.3): 49.2,
    ("ml", 0.5): 48.6,
    ("ml", 0.8): 48.4,
    ("gaml-soft", 0.1): 50.9,
    ("gaml-soft", 0.3): 51.1,
    ("gaml-soft", 0.5): 50.9,
    ("gaml-soft", 0.8): 50.8,
}
"""Method and alpha to the score on CoLA."""

TABLE4: Mapping[str, dict[str, int]] = {
    "single": {"cola": 2300, "sst-2": 4100},
    "joint": {"cola": 2100, "sst-2": 3800},
    "fastbert": {"cola": 2000, "sst-2": 3300},
    "gaml-soft": {"cola": 1800, "sst-2": 2900},
}
"""Method to optimizer steps until training stops early."""

TABLE5: Mapping[tuple[str, str], tuple[float, dict[str, float]]] = {
    ("entropy", "deebert"): (1.86, {"mnli": 81.2, "mrpc": 85.8, "sst-2": 90.0}),
    ("entropy", "gaml-soft"): (1.93, {"mnli": 83.0, "mrpc": 87.6, "sst-2": 91.3}),
    ("max-probability", "shallow-deep"): (1.91, {"mnli": 81.1, "mrpc": 85.7, "sst-2": 90.1}),
    ("max-probability", "gaml-soft"): (1.94, {"mnli": 82.8, "mrpc": 87.8, "sst-2": 91.4}),
}
"""Policy and method to speed-up and scores."""

TABLE8: Mapping[str, dict[str, tuple[float, float]]] = {
    "single": {"cifar-10": (1.00, 91.8), "cifar-100": (1.00, 68.6)},
    "joint": {"cifar-10": (1.26, 91.8), "cifar-100": (1.22, 69.1)},
    "dbt": {"cifar-10": (1.28, 92.1), "cifar-100": (1.25, 69.3)},
    "gaml-soft": {"cifar-10": (1.30, 92.6), "cifar-100": (1.27, 69.7)},
}
"""Method to speed-up and accuracy of a ResNet-56."""
