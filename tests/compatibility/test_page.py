"""docs/compatibility.md says what the tests beside this one check, row by row and cell by cell."""

from __future__ import annotations

from pathlib import Path

from tests.compatibility.cells import COLLECTORS
from tests.compatibility.loops import LOOPS, RULES
from tests.compatibility.rows import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def tables():
    """The page's tables: for each the header's cells, and {row: its other cells}."""
    found, lines = [], []
    for line in [*PAGE.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            (header, _, *rows), lines = lines, []
            assert len({name for name, *_ in rows}) == len(rows), header
            found.append((header, {name: cells for name, *cells in rows}))
    return found


def test_the_page_has_two_tables():
    assert len(tables()) == 2


def test_models_and_collectors():
    (_, *columns), rows = tables()[0]
    assert columns == list(COLLECTORS)
    assert rows == {name: [row.word(collector) for collector in COLLECTORS] for name, row in ROWS.items()}


def test_loops_and_rules():
    (_, *columns), rows = tables()[1]
    assert columns == [f"`{rule}`" for rule in RULES]
    assert rows == {name: [loop.word] * len(RULES) for name, loop in LOOPS.items()}
