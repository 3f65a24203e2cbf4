"""What an alignment looks like in metrics.jsonl."""

from __future__ import annotations

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


def _whole(report: AlignmentReport) -> AlignmentReport:
    """Return the report of all blocks as one: squared norms and products add up over parameters."""
    if report.gramian.ndim == 2:
        return report
    return AlignmentReport(report.names, report.gramian.sum(0), report.weights, report.skipped)
