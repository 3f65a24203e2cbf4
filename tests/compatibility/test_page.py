"""docs/compatibility.md says what the tests beside this one check, row by row and cell by cell."""

from __future__ import annotations

from pathlib import Path

from tests.compatibility.cells import COLLECTORS
from tests.compatibility.loops import LOOPS, RULES
from tests.compatibility.rows import ROWS
from tests.distributed import test_data_parallel, test_sharded

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


def test_the_page_has_three_tables():
    assert len(tables()) == 3


def test_models_and_collectors():
    (_, *columns), rows = tables()[0]
    assert columns == list(COLLECTORS)
    assert rows == {name: [row.word(collector) for collector in COLLECTORS] for name, row in ROWS.items()}


# The cases of tests/distributed that the table of devices stands for.
REPLICATED = {
    "bare": ("pcgrad", "batched", "streamed ga-soft", "probed", "graddrop, of rows"),
    "`DistributedDataParallel`": ("pcgrad, ddp", "batched, ddp", "ga-soft, ddp", "probed, ddp", "graddrop, ddp"),
}
SHARDED = {
    "`fully_shard`": ("fsdp", "some left"),
    "the same, hybrid": ("hybrid",),
    "tensor parallelism": ("tensor",),
    "`fully_shard` and tensor parallelism": ("fsdp and tensor", "one block not over data"),
}


def test_devices():
    (_, *columns), rows = tables()[1]
    assert columns == ["ranks", *COLLECTORS, "rules of the gradients"]
    assert list(rows) == [*REPLICATED, *SHARDED]
    for name, cases in REPLICATED.items():
        assert all(case in test_data_parallel.CASES for case in cases)
        assert rows[name] == ["2, 3", "yes", "as stacked", "yes", "yes", "yes"]
    for name, layouts in SHARDED.items():
        sizes = {size for layout in layouts for size in test_sharded.LAYOUTS[layout][1]}
        assert rows[name] == [", ".join(map(str, sorted(sizes))), "yes", *["refused"] * 4]


def test_loops_and_rules():
    (_, *columns), rows = tables()[2]
    assert columns == [f"`{rule}`" for rule in RULES]
    assert rows == {name: [loop.word] * len(RULES) for name, loop in LOOPS.items()}
