"""
Tables in texts that come out of result files, and a check that they still do.

    python benchmarks/tables.py README.md docs/*.md            # says what differs, and ends with status 1
    python benchmarks/tables.py --write README.md docs/*.md    # writes the tables anew

A text marks a table by two comments, between which nothing else stands:

    <!-- table: benchmarks/results/optimizer_step_cpu.md#2 columns: optimizer, median ms rows: 1, 3 -->
    <!-- end of table -->

`#2` is the second table of the file; without it the whole file stands there. `columns` chooses some of its columns by
name, `rows` some of its rows by number, from 1.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).parent.parent
_MARK = re.compile(
    r"(?P<start><!-- table: (?P<file>[\w./-]+\.md)(?:#(?P<number>\d+))?(?: columns: (?P<columns>[^>]+?))?"
    r"(?: rows: (?P<rows>[\d, ]+))? -->\n)"
    r"(?P<body>.*?)(?P<end><!-- end of table -->)",
    re.DOTALL,
)
_START = re.compile(r"<!-- table: ")


class TableError(ValueError):
    """A mark that names no table."""


def tables_of(text: str) -> list[str]:
    """The Markdown tables of a text, in their order."""
    found: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            found[-1].append(line)
        inside = line.startswith("|")
    return ["\n".join(lines) for lines in found]


def chosen(table: str, columns: Sequence[str]) -> str:
    """
    Some columns of a table, in the order that is asked for.

    Raises:
        `TableError`: It has no such column.
    """
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    unknown = [column for column in columns if column not in rows[0]]
    if unknown:
        raise TableError(f"a mark must name columns of its table but names {unknown[0]!r}; there are: {rows[0]}")
    places = [rows[0].index(column) for column in columns]
    return "\n".join("| " + " | ".join(row[place] for place in places) + " |" for row in rows)


def some_rows(table: str, numbers: Sequence[int]) -> str:
    """
    Some rows of a table, counted from 1 below its head, in the order that is asked for.

    Raises:
        `TableError`: It has no such row.
    """
    head, rule, *rows = table.splitlines()
    odd = [number for number in numbers if not 1 <= number <= len(rows)]
    if odd:
        raise TableError(f"a mark must name rows of its table but names {odd[0]}; there are {len(rows)}")
    return "\n".join([head, rule, *(rows[number - 1] for number in numbers)])


def expected(mark: re.Match[str], root: Path = ROOT) -> str:
    """
    What has to stand between the two comments of a mark.

    Raises:
        `TableError`: There is no such file, table or column.
    """
    path = root / mark["file"]
    if not path.is_file():
        raise TableError(f"a mark must name a result file but {mark['file']} does not exist; run its benchmark")
    text = path.read_text().strip()
    if mark["number"] is not None:
        found = tables_of(text)
        if not 1 <= int(mark["number"]) <= len(found):
            raise TableError(
                f"{mark['file']} has {len(found)} tables, but a mark asks for {mark['number']}; count them"
            )
        text = found[int(mark["number"]) - 1]
    if mark["columns"] is not None:
        text = chosen(text, [column.strip() for column in mark["columns"].split(",")])
    if mark["rows"] is not None:
        text = some_rows(text, [int(number) for number in mark["rows"].split(",")])
    return f"{text}\n"


def written(text: str, root: Path = ROOT) -> str:
    """The text with every table as its result file has it."""
    return _MARK.sub(lambda mark: mark["start"] + expected(mark, root) + mark["end"], text)


def differences(path: Path, root: Path = ROOT) -> list[str]:
    """One sentence for each table of a text that is not the result file's, and for each mark that has no end."""
    text = path.read_text()
    marks = list(_MARK.finditer(text))
    found = [
        f"{path.name}: the table of {mark['file']} differs; run python benchmarks/tables.py --write {path.name}"
        for mark in marks
        if mark["body"] != expected(mark, root)
    ]
    if len(_START.findall(text)) != len(marks):
        found.append(f"{path.name}: a mark must be closed by <!-- end of table -->, but one is not, or is misspelt")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, or writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    if args.write:
        for path in args.texts:
            path.write_text(written(path.read_text()))
    found = [sentence for path in args.texts for sentence in differences(path)]
    print("\n".join(found) or "Every table is that of its result file.")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
