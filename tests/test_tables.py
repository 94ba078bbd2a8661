"""Tables on a terminal: nothing of them is lost, however narrow it is."""

import re
import sys

import pytest

from ood_fast.report import tables


def wide_table() -> tables.Table:
    columns = tuple(f"loss {number}" for number in range(6))
    sections = []
    for heading in ("near: tin", "far: svhn"):
        rows = []
        for place, name in enumerate(("MSP", "Mahalanobis", "KNN")):
            texts = (f"{90 + place}.{column} ± 0.{place}" for column in range(6))
            rows.append((name, tuple(tables.Cell(text, bold=column == place) for column, text in enumerate(texts))))
        sections.append(tables.Section(heading, tuple(rows)))
    return tables.Table("AUROC (%)", "mean ± deviation; bold is better.", columns, tuple(sections))


@pytest.mark.parametrize("width", [24, 50, 80, 100])
def test_every_column_is_printed_at_every_width(width, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    table = wide_table()
    tables.show([table])
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert width < 40 or max(map(len, printed.splitlines())) <= width
    rows = [re.split(r" {2,}", line.strip()) for line in printed.splitlines()]
    for column in table.columns:
        assert any(column in row for row in rows), column
    for section in table.sections:
        for name, cells in section.rows:
            for cell in cells:
                assert any(row[0] == name and cell.text in [text.rstrip("*") for text in row] for row in rows), cell


def test_a_name_that_would_leave_no_room_has_a_line_of_its_own(capsys):
    name = "cifar10-elogitnorm epochs=2 batch_size=16 learning_rate=0.05 model=tiny"
    row = (name, tuple(tables.Cell(text) for text in ("9.26 [5.74, 16.11]", "47.24", "90.74")))
    tables.show([tables.Table("T", "c", ("accuracy", "ECE f", "ECE f/D"), (tables.Section("", (row,)),))])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:1] + lines[2:4]] == [
        ["T"],
        name.split(),
        ["9.26", "[5.74,", "16.11]", "47.24", "90.74"],
    ]


def test_a_table_without_rows_says_why(capsys):
    tables.show([tables.Table("T", "no rows", ("a",), ())])
    assert "no rows" in capsys.readouterr().out


def test_columns_are_grouped_to_fit():
    assert tables._blocks([10, 10, 10], room=36) == [[0, 1, 2]]
    assert tables._blocks([10, 10, 10], room=35) == [[0, 1], [2]]
    assert tables._blocks([10, 40, 10], room=20) == [[0], [1], [2]]
