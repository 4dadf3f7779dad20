"""A report as Markdown, for a README, an issue or a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .data import ReportData
from .facts import explained, facts, history_table, origin, settings, words_of


def report_markdown(report: ReportData) -> str:
    """The report as Markdown."""
    words = words_of(report)
    parts = [f"## {escaped(report.optimizer)}", *filter(None, [escaped(origin(report))])]
    parts.append(_table(("", "value"), [*facts(report), *settings(report)]))
    parts += [_table(table.columns, table.rows) for table in words.tables(report)]
    sentences = explained(words.explanations(report), words.tables(report)[0].columns)
    parts += filter(None, ["\n".join(f"- {escaped(sentence)}" for sentence in sentences)])
    if report.drift():
        history = history_table(report)
        parts += ["g-SNR, as a ratio to the first measurement:", _table(history.columns, history.rows)]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(escaped(cell) for cell in line)} |" for line in lines)


def escaped(value: Any) -> str:
    """As text on one line: what Markdown or HTML would read otherwise is escaped."""
    text = " ".join(str(value).split())
    for special in "\\`*|[]<>&":
        text = text.replace(special, f"\\{special}")
    return text
