"""A report as Markdown, for a README, an issue or a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .data import ReportData, format_bytes
from .schema import STATUSES


_COLUMNS = ("tensors", "shape", "scale", "g-SNR / sqrt(numel)", "learning rate", "step", "status")


def report_markdown(report: ReportData) -> str:
    """The report, as Markdown."""
    counts = report.summary()
    facts = [("learning rate (peak)", f"{report.learning_rate:g}"), ("weight decay", f"{report.weight_decay:g}")]
    facts += [(name, str(value)) for name, value in {**report.options, **report.run}.items()]
    if report.routes:
        facts.append(("whitened", f"{counts['whitened']:.0f} tensors, {counts['whitened_share']:.1%} of the elements"))
        facts.append(("to Adam", f"{counts['adam']:.0f} tensors"))
    else:
        facts.append(("tensors", ", ".join(f"{counts[status]:.0f} {status}" for status in STATUSES if counts[status])))
    facts.append(
        ("optimizer state", f"{format_bytes(report.state_bytes)} (AdamW: {format_bytes(report.adamw_state_bytes)})")
    )
    parts = [f"## {_text(report.optimizer)}", _table(("", "value"), facts)]
    if report.routes:
        shown = ("kind", "tensors", "shape", "route", "reason")
        parts.append(_table(shown, ([entry[key] for key in shown] for entry in report.by_route())))
        return "\n\n".join(parts) + "\n"
    for title, entries in (("kind", report.by_kind()), ("layer", report.by_layer())):
        parts.append(_table((title, *_COLUMNS), ([_first(entry[title]), *_values(entry)] for entry in entries)))
    if report.history:
        head = ("step", "smallest", "median", "largest")
        drift = (
            [entry["step"], *(f"{entry[key]:.4g}" for key in ("min", "median", "max"))] for entry in report.drift()
        )
        parts += ["g-SNR, as a ratio to the first measurement:", _table(head, drift)]
    return "\n\n".join(parts) + "\n"


def _first(value: str | int | None) -> str:
    return "none" if value is None else str(value)


def _values(entry: dict[str, Any]) -> list[Any]:
    """Medians, and the learning rate's range, of an entry by kind or layer."""
    if entry["learning_rate_range"] is None:
        return [entry["tensors"], entry["shape"], "", "", "", "", entry["status"]]
    low, high = entry["learning_rate_range"]
    steps = ", ".join(map(str, entry["steps"]))
    numbers = [f"{entry['scale']:.4g}", f"{entry['ratio']:.3f}", f"{low:.3g} to {high:.3g}", steps]
    return [entry["tensors"], entry["shape"], *numbers, entry["status"]]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_text(cell) for cell in line)} |" for line in lines)


def _text(value: Any) -> str:
    """As a cell: what Markdown or HTML would read otherwise is escaped."""
    text = " ".join(str(value).split())
    for special in "\\`*|[]<>&":
        text = text.replace(special, f"\\{special}")
    return text
