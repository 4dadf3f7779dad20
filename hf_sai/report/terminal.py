"""A report for a terminal of 80 columns."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .compare import Comparison, DiffRow
from .data import ReportData
from .facts import explained, origin, words_of
from .rows import TensorRow, format_shape


WIDTH = 80
STYLES = {"measured": "green", "given": "cyan", "fallback": "red", "pending": "yellow"}
_MOST, _MANY = 5, 20


def report_view(report: ReportData) -> Group:
    """What [`rich.console.Console.print`] shows: options, counts, and a table by kind of tensor."""
    options = ", ".join(f"{name}={value}" for name, value in report.options.items())
    head = Text(printable(report.optimizer), style="bold")
    settings = f"  lr={report.learning_rate:g}, weight_decay={report.weight_decay:g}, {printable(options)}"
    head.append(settings, style="not bold")
    state = Text(f"state {report.state_bytes:,} bytes (AdamW: {report.adamw_state_bytes:,})")
    about = [Text(printable(origin(report)))] if origin(report) else []
    return Group(
        head, *about, _counts(report), state, "", _first_table(report), *_range(report), *_largest(report.settled)
    )


def show(view: Any, console: Console | None = None) -> None:
    """Prints with colours in 80 columns, to the terminal unless another console is given."""
    (console or Console(width=WIDTH, highlight=False)).print(view)


def plain(view: Any) -> str:
    """The same as text without colours, whatever the environment says of them; no line ends in blanks."""
    buffer = io.StringIO()
    show(view, Console(file=buffer, width=WIDTH, color_system=None, force_terminal=False, highlight=False))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def table(*columns: tuple[str, int]) -> Table:
    """A table without frame, of columns with title and width; a negative width is that of numbers, to the right."""
    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for title, width in columns:
        made.add_column(title, width=abs(width), justify="right" if width < 0 else "left", no_wrap=True)
    return made


def cut(text: str, width: int) -> Text:
    """The end of a name that is too long; nothing in a name is markup, or moves the cursor."""
    text = printable(text)
    return Text(text if len(text) <= width else f"...{text[3 - width :]}")


def printable(text: str) -> str:
    """What others wrote, a report of the Hub: rich lets escape sequences through to the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _counts(report: ReportData) -> Text:
    counts = [Text(text, style=STYLES.get(status, "")) for text, status in words_of(report).counts(report)]
    return Text(f"{len(report.rows)} tensors: ").append_text(Text(", ").join(counts))


def _first_table(report: ReportData) -> Table:
    """By kind of tensor; where there is no number yet, the status stands at the end of the line."""
    words = words_of(report)
    first = words.tables(report)[0]
    layout = words.layout_of(report)
    shown = table(*((title, width) for _, title, width in layout))
    for texts in first.rows:
        row = dict(zip(first.columns, texts, strict=True))
        name, *cells = (row[column] or "-" for column, _, _ in layout)
        last = Text(printable(cells.pop()), overflow="ellipsis")
        if last.plain == "-":
            last = Text(row.get("status", "-"), style=STYLES["pending"], overflow="ellipsis")
        shown.add_row(cut(name, layout[0][2]), *cells, last)
    return shown


def _range(report: ReportData) -> list[Any]:
    span = report.learning_rate_range(report.tensors)
    if span is None:
        return []
    over = "over tensors and schedule" if report.schedule else "over tensors, at the peak"
    lines = [f"learning rate of a tensor: {span[0]:.3g} to {span[1]:.3g} {over}"]
    lines += explained(words_of(report).explanations(report), ())
    return ["", *map(Text, lines)]


def _largest(settled: list[TensorRow]) -> list[Any]:
    """Where a gradient's mean stands out most; of a few tensors the table says it."""
    if len(settled) <= 4 * _MOST:
        return []
    rows = table(("largest g-SNR / sqrt(n)", 60), ("scale", -9), ("/sqrt(n)", -8))
    for row in sorted(settled, key=lambda row: -row.gsnr_over_sqrt_numel)[:_MOST]:
        rows.add_row(cut(row.name, 60), f"{row.scale:.4g}", f"{row.gsnr_over_sqrt_numel:.3f}")
    return ["", rows]


def diff_view(diff: Comparison, ratio: float | None = None) -> Group:
    """A comparison: what one run lacks, then the tensors that are furthest apart."""
    parts: list[Any] = [Text(diff.headline(), style="bold"), *(Text(printable(note)) for note in diff.notes)]
    lacking = [row for row in diff.rows if row.missing or row.reshaped]
    if lacking:
        rows = table(("missing or pending in one run", 54), ("", 25))
        for row in lacking[:_MANY]:
            rows.add_row(cut(row.name, 54), Text(_lack(row), style="yellow"))
        parts += ["", rows, *_more(lacking)]
    both = sorted(
        (row for row in diff.rows if row.ratio is not None), key=lambda row: -abs(math.log(row.ratio or 1.0))
    )
    if both:
        rows = table((f"{diff.quantity}, furthest apart first", 48), ("first", -9), ("second", -9), ("ratio", -11))
        for row in both[:_MANY]:
            values = [f"{value:.4g}" for value in row.values(diff.quantity)]
            style = "red" if ratio is not None and row.is_apart(ratio) else ""
            rows.add_row(cut(row.name, 48), *values, Text(f"{row.ratio:.4g}", style=style))
        parts += ["", rows, *_more(both)]
    return Group(*parts)


def _lack(row: DiffRow) -> str:
    if row.missing or row.first is None or row.second is None:
        return row.missing
    shapes = [format_shape(side.shape) for side in (row.first, row.second)]
    return " -> ".join(shapes)


def _more(rows: list[Any]) -> list[Text]:
    return [Text(f"and {len(rows) - _MANY} more")] if len(rows) > _MANY else []
