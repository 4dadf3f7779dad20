"""The tables in our texts are those of the result files."""

from __future__ import annotations

from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
RESULT = "Two.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n| c |\n| --- |\n| 3 |\n| 2 |\n\nMeasured.\n"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    return tables


@pytest.fixture
def text(tmp_path):
    """A text with a result file beside it; returns what makes the text."""
    (tmp_path / "result.md").write_text(RESULT)

    def make(mark, body=""):
        path = tmp_path / "text.md"
        path.write_text(f"before\n\n<!-- table: {mark} -->\n{body}<!-- end of table -->\n\nafter\n")
        return path

    return make


@pytest.mark.parametrize(
    ("mark", "body"),
    [
        ("result.md", RESULT),
        ("result.md#1", "| a | b |\n| --- | --- |\n| 1 | 2 |\n"),
        ("result.md#2", "| c |\n| --- |\n| 3 |\n| 2 |\n"),
        ("result.md#1 columns: b", "| b |\n| --- |\n| 2 |\n"),
        ("result.md#1 columns: b, a", "| b | a |\n| --- | --- |\n| 2 | 1 |\n"),
        ("result.md#2 rows: 2, 1", "| c |\n| --- |\n| 2 |\n| 3 |\n"),
        ("result.md#1 columns: b rows: 1", "| b |\n| --- |\n| 2 |\n"),
    ],
)
def test_a_table_is_checked_and_written(tables, text, tmp_path, mark, body):
    path = text(mark)
    assert tables.differences(path, tmp_path) == [
        "text.md: the table of result.md differs; run python benchmarks/tables.py --write text.md"
    ]
    path.write_text(tables.written(path.read_text(), tmp_path))
    assert path.read_text() == f"before\n\n<!-- table: {mark} -->\n{body}<!-- end of table -->\n\nafter\n"
    assert tables.differences(path, tmp_path) == []
    path.write_text(path.read_text().replace("| 2 |", "| 4 |").replace("| 3 |", "| 4 |"))
    assert len(tables.differences(path, tmp_path)) == 1


def test_a_mark_without_an_end_is_told(tables, tmp_path):
    path = tmp_path / "text.md"
    path.write_text("<!-- table: result.md -->\n")
    assert tables.differences(path, tmp_path) == [
        "text.md: a mark must be closed by <!-- end of table -->, but one is not, or is misspelt"
    ]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("none.md", "none.md does not exist; run its benchmark"),
        ("result.md#3", "result.md has 2 tables, but a mark asks for 3"),
        ("result.md#1 columns: z", "names 'z'; there are: \\['a', 'b'\\]"),
        ("result.md#1 rows: 2", "names 2; there are 1"),
    ],
)
def test_a_mark_that_names_nothing_is_an_error(tables, text, tmp_path, mark, message):
    path = text(mark)
    with pytest.raises(tables.TableError, match=message):
        tables.differences(path, tmp_path)


def test_tables_of_our_texts_are_those_of_the_result_files(tables):
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert [sentence for path in texts for sentence in tables.differences(path)] == []
