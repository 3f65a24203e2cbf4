"""A table as Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

UNFINISHED = "not run"


@dataclass(frozen=True)
class Cell:
    """A number, ours over the seeds and the paper's.

    Attributes:
        ours: One value a finished seed.
        wanted: How many seeds were asked for; 0 where the row has no such number.
        paper: The paper's figure, None where it has none.
        digits: After the point.
        unit: What there is one value of each: seeds, or runs over several tasks.
    """

    ours: Sequence[float] = ()
    wanted: int = 1
    paper: float | None = None
    digits: int = 1
    unit: str = "seeds"

    def __str__(self) -> str:
        """Return mean ± deviation over the seeds, with those that are missing, and the paper's in brackets."""
        paper = "" if self.paper is None else f" [{self.paper:.{self.digits}f}]"
        if not self.ours:
            return (UNFINISHED if self.wanted else "-") + paper
        spread = f" ± {statistics.stdev(self.ours):.{self.digits}f}" if len(self.ours) > 1 else ""
        missing = "" if len(self.ours) == self.wanted else f" ({len(self.ours)} of {self.wanted} {self.unit})"
        return f"{statistics.fmean(self.ours):.{self.digits}f}{spread}{missing}{paper}"


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        title: What it shows.
        columns: The names of the columns, the first of them the rows' own.
        rows: A name and a cell for each other column.
        notes: Sentences below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    notes: Sequence[str] = field(default_factory=tuple)

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [list(self.columns), ["---"] * len(self.columns)]
        lines += [[name, *map(str, cells)] for name, cells in self.rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([f"# {self.title}", text, *self.notes]) + "\n"

    def write(self, path: Path) -> list[Path]:
        """Write Markdown and CSV beside each other, and return the files.

        The CSV has a line a cell: row, column, mean, deviation, how many values and how many were wanted, paper.
        """
        page, sheet = path.with_suffix(".md"), path.with_suffix(".csv")
        page.write_text(self.markdown(), encoding="utf-8")
        with sheet.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "column", "mean", "deviation", "finished", "wanted", "paper"])
            for name, cells in self.rows:
                for column, cell in zip(self.columns[1:], cells, strict=True):
                    mean = statistics.fmean(cell.ours) if cell.ours else ""
                    deviation = statistics.stdev(cell.ours) if len(cell.ours) > 1 else ""
                    paper = "" if cell.paper is None else cell.paper
                    writer.writerow([name, column, mean, deviation, len(cell.ours), cell.wanted, paper])
        return [page, sheet]
