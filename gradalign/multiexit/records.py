"""What an alignment looks like in metrics.jsonl, and how often its losses conflict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from gradalign import AlignmentReport, GradientAligner


def alignment(optimizer: GradientAligner) -> dict[str, Any]:
    """Return norms, angles, conflicts, weights and reversals of the last alignment, over all blocks together.

    Raises:
        RuntimeError: There was none yet.
    """
    report = optimizer.report
    if report is None:
        raise RuntimeError("backward() must come before its report is written.")
    whole = _whole(report)
    return {
        "groups": list(report.names),
        "norms": whole.norms,
        "cosines": whole.cosines,
        "angles": whole.angles,
        "conflicts": whole.conflicts,
        "weights": report.weights,
        "reversals": report.reversals,
    }


def conflict_shares(steps: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the share of the steps whose losses conflict, and of those with a weight below 0 in any block.

    Args:
        steps: A run's lines of steps; those of stages with one loss are left out.

    Returns:
        Both in [0, 1]; None where every step has one loss.
    """
    several = [step for step in steps if len(step["groups"]) > 1]
    if not several:
        return None
    return fmean(bool(step["conflicts"]) for step in several), fmean(step["reversals"] > 0 for step in several)


def _whole(report: AlignmentReport) -> AlignmentReport:
    """Return the report of all blocks as one: squared norms and products add up over parameters."""
    if report.gramian.ndim == 2:
        return report
    return AlignmentReport(report.names, report.gramian.sum(0), report.weights, report.skipped)
