"""Names in CSV files are no formulas, and come back as they were."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ood_fast import spreadsheet

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "''@x", "＝1+1", "-", "=1"]
PLAIN = ["cat", "", "a=b", "1", "-1", "+1.5", "-2.5e-3", "-inf", "'quoted'", "é", " =1", "−1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_written_as_text(text):
    assert spreadsheet.as_cell(text) == "'" + text


@pytest.mark.parametrize("value", [*PLAIN, -1.5, 3, None, True, float("-inf")])
def test_what_is_none_stays(value):
    assert spreadsheet.as_cell(value) is value


@given(st.text(max_size=8), st.text("'=+-@\t\r\n1e.", max_size=8))
@example("-1", "'-1")
def test_names_come_back(tmp_path_factory, one, other):
    for text in (one, other):
        assert spreadsheet.from_cell(spreadsheet.as_cell(text)) == text


def test_a_table_comes_back(tmp_path):
    records = [{"name": text, "value": number} for number, text in enumerate([*FORMULAS, *PLAIN])]
    path = tmp_path / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        spreadsheet.write_records(file, records)
    assert spreadsheet.read_records(path) == [{**record, "value": str(record["value"])} for record in records]
    for row in csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")):
        assert row[0][:1] not in tuple("=@\t\r\n") or row[0] == ""


@pytest.mark.parametrize("content", [b"\xff", b"a,b\n1\n", b"a\n1,2\n", b'a\n"' + b"x" * 200_000, b"a\n1\x00,2\n"])
def test_what_is_no_table_is_refused(content, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        spreadsheet.read_records(tmp_path / "x.csv")
