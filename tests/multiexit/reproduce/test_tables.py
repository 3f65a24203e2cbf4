from __future__ import annotations

import csv

import pytest

from gradalign.multiexit.reproduce.drawing import draw_table
from gradalign.multiexit.reproduce.tables import Cell, Table

CELLS = {
    "80.0": Cell([80.0]),
    "80.0 ± 1.4": Cell([79.0, 81.0], 2),  # sqrt(2)
    "80.0 (1 of 2 seeds) [91.5]": Cell([80.0], 2, 91.5),
    "80.0 ± 1.4 (2 of 6 runs)": Cell([79.0, 81.0], 6, unit="runs"),
    "not run": Cell(),
    "-": Cell((), 0),
    "not run [91.5]": Cell((), 2, 91.5),
    "1.96 [1.90]": Cell([1.956], 1, 1.9, digits=2),
    "4100 [4200]": Cell([4100], 1, 4200, digits=0),
}


@pytest.mark.parametrize("text", CELLS)
def test_a_cell(text):
    assert str(CELLS[text]) == text


def test_a_table_is_written_as_markdown_csv_and_picture(tmp_path):
    rows = [("joint", [Cell([79.0, 81.0], 2, 90.5), Cell()]), ("ml, 0.3", [Cell([70.0], 2), Cell([1.0])])]
    table = Table("Table 9: something", ("method", "sst-2", "x"), rows, ("Said below.",))
    page, sheet = table.write(tmp_path / "table9")
    assert page.read_text(encoding="utf-8") == (
        "# Table 9: something\n\n"
        "| method | sst-2 | x |\n| --- | --- | --- |\n"
        "| joint | 80.0 ± 1.4 [90.5] | not run |\n| ml, 0.3 | 70.0 (1 of 2 seeds) | 1.0 |\n\n"
        "Said below.\n"
    )
    with sheet.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0] == {
        "row": "joint", "column": "sst-2", "mean": "80.0", "deviation": str(2**0.5), "finished": "2", "wanted": "2",
        "paper": "90.5",
    }  # fmt: skip
    assert [(line["row"], line["column"], line["mean"], line["finished"]) for line in lines[1:]] == [
        ("joint", "x", "", "0"),
        ("ml, 0.3", "sst-2", "70.0", "1"),
        ("ml, 0.3", "x", "1.0", "1"),
    ]
    picture = draw_table(table, ["sst-2", "x"], tmp_path / "table9")
    assert picture == tmp_path / "table9.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
