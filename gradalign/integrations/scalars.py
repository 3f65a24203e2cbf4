"""What a report says in single numbers, for whatever logs them."""

from __future__ import annotations

import math

import torch

from gradalign import AlignmentReport


def on_cpu(report: AlignmentReport) -> AlignmentReport:
    """Return the report with its tensors in float64 on the CPU; this waits for their device."""
    gramian, weights = report.gramian.detach().cpu().double(), report.weights
    weights = None if weights is None else weights.detach().cpu().double()
    return AlignmentReport(report.names, gramian, weights, report.skipped, report.collector, report.derivative)


def scalars(report: AlignmentReport) -> dict[str, float]:
    """Return the report's numbers by name, those that are finite: what a collector does not see is left out.

    ``conflicts``, the number of pairs that conflict, in any block; ``reversals``, of weights below zero; ``skipped``, 1
    for a step that is left out. ``norm/a`` and ``cosine/a/b`` are of the whole gradients, over all blocks together;
    ``weight/a`` is the mean over the blocks.

    >>> scalars(AlignmentReport(("a", "b"), torch.tensor([[4.0, -3.0], [-3.0, 9.0]]), torch.tensor([1.5, 0.5])))
    {'conflicts': 1.0, 'reversals': 0.0, 'skipped': 0.0, 'norm/a': 2.0, 'norm/b': 3.0, 'cosine/a/b': -0.5,
    'weight/a': 1.5, 'weight/b': 0.5}
    """
    report = on_cpu(report)
    names, K = report.names, len(report.names)
    # Blocks share no parameter: products of the whole gradients are the sums of the blocks'.
    whole = AlignmentReport(names, report.gramian.reshape(-1, K, K).sum(0), None)
    pairs_seen = K == 1 or bool(report.gramian[..., ~torch.eye(K, dtype=torch.bool)].isfinite().any())
    weights_seen = report.weights is None or bool(report.weights.isfinite().any())
    numbers = {
        "conflicts": float(len(report.conflicts)) if pairs_seen else math.nan,
        "reversals": float(report.reversals) if weights_seen else math.nan,
        "skipped": float(report.skipped),
    }
    numbers |= {f"norm/{name}": norm for name, norm in zip(names, whole.norms.tolist(), strict=True)}
    cosines = whole.cosines.tolist()
    numbers |= {f"cosine/{names[i]}/{names[j]}": cosines[i][j] for i in range(K) for j in range(i + 1, K)}
    if report.weights is not None:
        means = report.weights.reshape(-1, K).mean(0).tolist()
        numbers |= {f"weight/{name}": weight for name, weight in zip(names, means, strict=True)}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}
