"""What a report says, worded once for terminal, Markdown, page and picture: facts, tables and legends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..optim.routing import ADAM
from .data import ReportData
from .rows import RouteRow, TensorRow, format_shape
from .schema import STATUSES


Fact = tuple[str, str]
Cell = tuple[str, Any]  # text, and what a column sorts by


@dataclass(frozen=True)
class Table:
    """Texts in columns; the titles are the same in every medium."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def facts(report: ReportData) -> list[Fact]:
    """The numbers that matter first, each with its name."""
    state = f"{format_bytes(report.state_bytes)} (AdamW: {format_bytes(report.adamw_state_bytes)})"
    counted = ", ".join(text for text, _ in words_of(report).counts(report))
    found = [
        ("learning rate (peak)", f"{report.learning_rate:g}"),
        ("weight decay", f"{report.weight_decay:g}"),
        ("tensors", counted or "0"),
    ]
    rates = report.learning_rate_range(report.settled)
    if rates is not None:
        scales = [row.scale for row in report.settled]
        ratios = [row.gsnr_over_sqrt_numel for row in report.settled]
        found.append(("scale", span(min(scales), max(scales))))
        found.append(("g-SNR / sqrt(numel)", span(min(ratios), max(ratios))))
        found.append(("learning rate x scale", span(*rates)))
    return [*found, ("optimizer state", state)]


def settings(report: ReportData) -> list[Fact]:
    """The options that ran and the facts of the run."""
    return [(name, str(value)) for name, value in {**report.options, **report.run}.items()]


def history_table(report: ReportData) -> Table:
    """g-SNR over time, as a ratio to the first measurement."""
    keys = ("min", "median", "max")
    rows = [(str(entry["step"]), *(f"{entry[key]:.4g}" for key in keys)) for entry in report.drift()]
    return Table(("step", "smallest", "median", "largest"), rows)


def format_bytes(count: int) -> str:
    """`1_500_000` as `1.5 MB`."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def span(low: float, high: float) -> str:
    """Both ends; one number where they look alike."""
    texts = f"{low:.4g}", f"{high:.4g}"
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


class Groups:
    """The words of rows that say a group: plain, and right for any optimizer."""

    heading = "Group"
    # of the first table, for a terminal: column, title there, width (negative: to the right)
    layout: tuple[tuple[str, str, int], ...] = (
        ("kind", "tensors", 32),
        ("tensors", "no.", -4),
        ("shape", "shape", -12),
        ("route", "route", 29),
    )
    # of the table of all tensors: title, and whether it sorts by number
    columns: tuple[tuple[str, bool], ...] = (
        ("tensor", False),
        ("layer", True),
        ("shape", True),
        ("elements", True),
        ("route", False),
        ("why", False),
    )

    def counts(self, report: ReportData) -> list[tuple[str, str]]:
        """How many tensors there are of what, each with the name of its style."""
        return [(f"{len(report.routes)} in {len({row.route for row in report.routes})} groups", "")]

    def headline(self, report: ReportData) -> str:
        """Over the picture."""
        return f"{', '.join(text for text, _ in self.counts(report))}  |  {_state(report)}"

    def legend(self, report: ReportData) -> list[tuple[bool | None, str]]:
        """Entries: whether it is of the second colour, `None` for no colour; and the text."""
        return []

    def is_second(self, row: RouteRow | TensorRow) -> bool:
        """Whether a row is drawn in the second colour."""
        return False

    def tables(self, report: ReportData) -> list[Table]:
        """The rows summed up."""
        rows = [
            (entry["kind"], str(entry["tensors"]), entry["shape"], f"{entry['route']}: {entry['reason']}")
            for entry in report.by_route()
        ]
        return [Table(("kind", "tensors", "shape", "route"), rows)]

    def cells(self, report: ReportData, row: Any) -> list[Cell]:
        """One row of the table of all tensors; what sorts as `""` is last."""
        elements = (f"{row.numel:,}", row.numel)
        return [*_first_cells(row), elements, (row.route, row.route), (row.reason, row.reason)]

    def mark(self, rows: Sequence[Any]) -> tuple[str, str]:
        """Of the tensors of one cell of the map: the class that draws it, and its details."""
        style = "adam" if any(map(self.is_second, rows)) else "whitened"
        return style, "\n".join(f"{row.name}: {row.route}, {row.reason}" for row in rows[:4])

    def note(self, report: ReportData) -> str:
        """Under the table of all tensors."""
        return ""


class Routes(Groups):
    """The words of rows that say where a tensor was taken: whitened, or to Adam."""

    heading = "Route"

    def counts(self, report: ReportData) -> list[tuple[str, str]]:
        found = report.summary()
        whitened = f"{found['whitened']:.0f} whitened ({found['whitened_share']:.1%} of the elements)"
        return [(whitened, ""), (f"{found['adam']:.0f} to Adam", "")]

    def headline(self, report: ReportData) -> str:
        elements = sum(row.numel for row in report.routes) or 1
        return f"{report.summary()['whitened_share']:.1%} of {elements:,} elements whitened  |  {_state(report)}"

    def legend(self, report: ReportData) -> list[tuple[bool | None, str]]:
        found = report.summary()
        whitened = f"whitened, no state: {found['whitened']:.0f} tensors"
        return [(False, whitened), (True, f"to Adam: {found['adam']:.0f} tensors")]

    def is_second(self, row: RouteRow | TensorRow) -> bool:
        return isinstance(row, RouteRow) and row.route == ADAM


class Scales(Groups):
    """The words of rows with a measured scale."""

    heading = "Scale"
    layout = (
        ("kind", "tensors", 34),
        ("tensors", "no.", -4),
        ("shape", "shape", -12),
        ("scale", "scale", -9),
        ("g-SNR / sqrt(numel)", "/sqrt(n)", -8),
        ("step", "step", -8),
    )
    columns = (
        ("tensor", False),
        ("scale", True),  # on a phone only the first columns are seen at once
        ("g-SNR / sqrt(n)", True),
        ("g-SNR", True),
        ("learning rate", True),
        ("layer", True),
        ("shape", True),
        ("step", True),
        ("status", False),
    )

    def counts(self, report: ReportData) -> list[tuple[str, str]]:
        found = report.summary()
        return [(f"{found[status]:.0f} {status}", status) for status in STATUSES if found[status]]

    def headline(self, report: ReportData) -> str:
        counted = ", ".join(text for text, _ in self.counts(report))
        rate = f"learning rate {report.learning_rate:g}, normalize={report.options.get('normalize', 'none')}"
        return f"Learning-rate scale of {len(report.tensors)} tensors (g-SNR): {counted}  |  {rate}"

    def legend(self, report: ReportData) -> list[tuple[bool | None, str]]:
        texts = {
            "pending": "hatched: pending, never had a gradient to measure",
            "fallback": "red frame: fallback, sqrt(numel)",
        }
        return [(None, text) for status, text in texts.items() if report.by_status(status)]

    def tables(self, report: ReportData) -> list[Table]:
        columns = ("tensors", "shape", "scale", "g-SNR / sqrt(numel)", "learning rate", "step", "status")
        return [
            Table((title, *columns), [_entry_texts(title, entry) for entry in entries])
            for title, entries in (("kind", report.by_kind()), ("layer", report.by_layer()))
        ]

    def cells(self, report: ReportData, row: Any) -> list[Cell]:
        name, layer, shape = _first_cells(row)
        rates = report.learning_rate_range([row])
        if rates is None:
            return [name, *[("", "")] * 4, layer, shape, ("", ""), (row.status, row.status)]
        return [
            name,
            (f"{row.scale:.4g}", row.scale),
            (f"{row.gsnr_over_sqrt_numel:.4f}", row.gsnr_over_sqrt_numel),
            (f"{row.gsnr:.5g}", row.gsnr),
            (span(*rates), row.learning_rate),
            layer,
            shape,
            (str(row.step), row.step),
            (row.status, row.status),
        ]

    def mark(self, rows: Sequence[Any]) -> tuple[str, str]:
        more = f"\nand {len(rows) - 4} more" if len(rows) > 4 else ""
        tip = "\n".join(map(tip_of, rows[:4])) + more
        if not any(row.settled for row in rows):
            return "pending", tip
        return "fallback" if any(row.status == "fallback" for row in rows) else "settled", tip

    def note(self, report: ReportData) -> str:
        over = "from the lowest to the highest of the schedule" if report.schedule else "at the peak"
        return f"; learning rates are times scale, {over}"


WORDS = {"scales": Scales(), "routes": Routes(), "groups": Groups()}


def words_of(report: ReportData) -> Groups:
    """The words for a report's rows."""
    return WORDS[report.kind]


def tip_of(row: TensorRow) -> str:
    """One tensor's details in a line."""
    if not row.settled:
        return f"{row.name}: pending"
    return (
        f"{row.name}: scale {row.scale:.4g}, g-SNR {row.gsnr:.4g}, {row.gsnr_over_sqrt_numel:.4f} of sqrt(numel), "
        f"{row.status} at step {row.step}"
    )


def _state(report: ReportData) -> str:
    return f"state {format_bytes(report.state_bytes)}, AdamW's {format_bytes(report.adamw_state_bytes)}"


def _first_cells(row: TensorRow | RouteRow) -> list[Cell]:
    layer = ("", "") if row.layer is None else (str(row.layer), row.layer)
    return [(row.name, row.name), layer, (format_shape(row.shape), row.numel)]


def _entry_texts(title: str, entry: dict[str, Any]) -> tuple[str, ...]:
    """Medians, and the learning rate's range, of an entry by kind or layer; empty where all pend."""
    first = "none" if entry[title] is None else str(entry[title])
    numbers = [""] * 4
    if entry["learning_rate_range"] is not None:
        low, high = entry["learning_rate_range"]
        steps = ", ".join(map(str, entry["steps"]))
        numbers = [f"{entry['scale']:.4g}", f"{entry['ratio']:.3f}", f"{low:.3g} to {high:.3g}", steps]
    return first, str(entry["tensors"]), entry["shape"], *numbers, entry["status"]
