"""Pictures of tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from gradalign.multiexit.figures import canvas
from gradalign.multiexit.reproduce.tables import Table


def draw_table(table: Table, columns: Sequence[str], path: Path) -> Path:
    """Draw some columns of a table, a panel each: our mean and the seeds' range, and the paper's figure.

    Returns:
        The file.
    """
    figure, axes = canvas(len(columns), height=1.0 + 0.32 * max(len(table.rows), 6))
    names = [name for name, _ in table.rows]
    for axis, column in zip(axes, columns, strict=True):
        place = list(table.columns).index(column) - 1
        for line, (_, cells) in enumerate(table.rows):
            cell = cells[place]
            if cell.ours:
                axis.plot([min(cell.ours), max(cell.ours)], [line, line], color="C0", linewidth=2, alpha=0.5)
                axis.plot(statistics.fmean(cell.ours), line, "o", color="C0", label="ours")
            if cell.paper is not None:
                axis.plot(cell.paper, line, "|", color="C1", markersize=12, label="the paper")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(column)
        axis.grid(alpha=0.3)
        axis.label_outer()
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2)
    file = path.with_suffix(".png")
    figure.savefig(file, dpi=120)
    return file
