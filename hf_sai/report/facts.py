"""What a report says, worded once for terminal, Markdown, page and picture: facts, tables and legends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..optimizer_facts import A_RATE, ADAM, defaults_of
from .data import ReportData
from .quantities import FROM_ZERO, UPDATE, moved_text, quantity_of
from .rows import RouteRow, TensorRow, format_shape
from .schema import STATUSES


Fact = tuple[str, str]
Cell = tuple[str, Any]  # text, and what a column sorts by
ORIGIN = ("model", "date", "repository")  # facts of the run that stand in a title
FACTOR = "factor"


@dataclass(frozen=True)
class Table:
    """Texts in columns; the titles are the same in every medium."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def facts(report: ReportData) -> list[Fact]:
    """The numbers that matter first, each with its name."""
    state = f"{format_bytes(report.state_bytes)} (AdamW: {format_bytes(report.adamw_state_bytes)})"
    counted = ", ".join(text for text, _ in words_of(report).counts(report))
    found = [*rates(report), ("tensors", counted or "0")]
    ends = report.learning_rate_range(report.settled)
    if ends is not None:
        found.append(("learning rate of a tensor", span(*ends)))
        for name, values in (
            ("update / weight", [row.moved for row in report.settled if row.moved]),
            ("update (RMS)", [row.update_rms for row in report.settled if row.update_rms]),
            ("scale", [row.scale for row in report.settled]),
            ("g-SNR / sqrt(numel)", [row.gsnr_over_sqrt_numel for row in report.settled]),
        ):
            if values:
                found.append((name, span(min(values), max(values))))
    return [*found, ("optimizer state", state)]


def rates(report: ReportData) -> list[Fact]:
    """What hosts have fields for."""
    return [("learning rate (peak)", f"{report.learning_rate:g}"), ("weight decay", f"{report.weight_decay:g}")]


def batch(report: ReportData) -> list[Fact]:
    """What the scales were measured on, or a step is of."""
    size = report.run.get("effective_batch_size")
    return [] if size is None else [(words_of(report).batch, str(size))]


def chosen(report: ReportData) -> dict[str, Any]:
    """The options that are not the optimizer's defaults, as a report holds them."""
    defaults = defaults_of(report.optimizer)
    return {name: value for name, value in report.options.items() if name not in defaults or value != defaults[name]}


def ratio_sentence(report: ReportData) -> str:
    """How g-SNR compares with the size of the tensors."""
    ratios = [row.gsnr_over_sqrt_numel for row in report.settled]
    between = f"between {min(ratios):.3g} and {max(ratios):.3g}" if ratios else "not known yet"
    return f"mostly the size of the tensor: divided by sqrt(numel) it is {between} here."


def status_sentence(report: ReportData) -> str:
    """What is pending or a fallback; empty where nothing is."""
    sentences = {
        "fallback": "Tensors of one element or with a constant gradient, whose scale is sqrt(numel): {}.",
        "pending": "Tensors that never had a gradient to measure, and did not train: {}.",
    }
    counts = {status: len(report.by_status(status)) for status in sentences}
    return " ".join(sentences[status].format(count) for status, count in counts.items() if count)


def settings(report: ReportData) -> list[Fact]:
    """The options that ran and the facts of the run."""
    return [(name, shown(value)) for name, value in {**report.options, **report.run}.items() if name not in ORIGIN]


def shown(value: Any) -> str:
    """The value of an option, for people."""
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)


def origin(report: ReportData) -> str:
    """What was trained, when, and where it went, as far as the run says it."""
    return ", ".join(str(report.run[name]) for name in ORIGIN if report.run.get(name))


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
    batch = "effective batch size"
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

    def layout_of(self, report: ReportData) -> tuple[tuple[str, str, int], ...]:
        """`layout`, with the columns that fit the report."""
        return self.layout

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

    def explanations(self, report: ReportData) -> dict[str, str]:
        """What the columns mean, by their titles; and under a name of its own what else must be known."""
        return {}


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

    def explanations(self, report: ReportData) -> dict[str, str]:
        return {
            "route": (
                '"matrix" is whitened as it is, without state, and each of its updates has a root mean square of '
                'learning rate x scale; "transposed" is stored (in, out); "in 3 parts" is whitened as three matrices, '
                '"matrices" as one per leading index; "adam" is updated by Adam, with two moments.'
            ),
            "why": "the module or the choice that decided the route.",
            "share of the elements": "of all that are trained.",
        }


class Scales(Groups):
    """The words of rows with a measured scale."""

    heading = "Scale"
    batch = "effective batch size at the measurement"
    layout = (
        ("kind", "tensors", 27),
        ("tensors", "no.", -4),
        ("shape", "shape", -11),
        ("update / weight", "upd/weight", -10),
        ("learning rate", "rate", -8),
        ("scale", "scale", -7),
        ("step", "step", -7),
    )
    columns = (
        ("tensor", False),
        ("update / weight", True),  # on a phone only the first columns are seen at once
        ("learning rate", True),
        ("scale", True),
        ("g-SNR / sqrt(n)", True),
        ("g-SNR", True),
        ("update (RMS)", True),
        ("weight (RMS)", True),
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
        return f"{len(report.tensors)} tensors: {counted}  |  {rate}"

    def legend(self, report: ReportData) -> list[tuple[bool | None, str]]:
        texts = {
            "pending": "hatched: pending, never had a gradient to measure",
            "fallback": "red frame: fallback, sqrt(numel)",
        }
        return [(None, text) for status, text in texts.items() if report.by_status(status)]

    def layout_of(self, report: ReportData) -> tuple[tuple[str, str, int], ...]:
        """With how far tensors move: as a share where that is known of the matrices."""
        update = ("update (RMS)", "update", -10)
        by_share = quantity_of(report) is not UPDATE
        return tuple(each if by_share or each[0] != "update / weight" else update for each in self.layout)

    def tables(self, report: ReportData) -> list[Table]:
        return [
            Table((title, *_ENTRY_COLUMNS), [_entry_texts(title, entry) for entry in entries])
            for title, entries in (("kind", report.by_kind()), ("layer", report.by_layer()))
        ]

    def cells(self, report: ReportData, row: Any) -> list[Cell]:
        name, layer, shape = _first_cells(row)
        rates = report.learning_rate_range([row])
        if rates is None:
            return [name, *[("", "")] * 7, layer, shape, ("", ""), (row.status, row.status)]
        return [
            name,
            (moved_text(row.moved, row.update_rms), row.moved or ""),
            (span(*rates), row.learning_rate),
            (f"{row.scale:.4g}", row.scale),
            (f"{row.gsnr_over_sqrt_numel:.4f}", row.gsnr_over_sqrt_numel),
            (f"{row.gsnr:.5g}", row.gsnr),
            (f"{row.update_rms:.3g}", row.update_rms) if row.update_rms else ("", ""),
            (f"{row.weight_rms:.3g}", row.weight_rms) if row.weight_rms else ("", ""),
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

    def explanations(self, report: ReportData) -> dict[str, str]:
        """With what the factor of LoRA's pairs is, where there is one."""
        paired = any(row.factor != 1.0 for row in report.tensors)
        rate = "what the tensor's first gradient was multiplied by, at the peak: the run's learning rate x scale"
        found = {"learning rate": f"{rate}{' x factor' if paired else ''}."}
        if report.schedule:
            found["learning rate"] += " A range is from the lowest to the highest of the schedule."
        if paired:
            found[FACTOR] = (
                "LoRA's A and B are trained as pairs, on bounded gradients (lora_policy=paired): it is 1 / the norm "
                f"of the gradient, or of the pair's first where that is larger, and for A {A_RATE:g} times that."
            )
        if any(row.update_rms for row in report.tensors):
            found["update / weight"] = (
                "root mean square of the first update, at the peak, over that of the weights before it; "
                f'"{FROM_ZERO}" where these were all zero.'
            )
        return found


_ENTRY_COLUMNS = (
    "tensors",
    "shape",
    "update / weight",
    "update (RMS)",
    "learning rate",
    "over the schedule",
    "scale",
    "g-SNR / sqrt(numel)",
    "step",
    "status",
)
WORDS = {"scales": Scales(), "routes": Routes(), "groups": Groups()}


def words_of(report: ReportData) -> Groups:
    """The words for a report's rows."""
    return WORDS[report.kind]


def explained(explanations: dict[str, str], columns: Sequence[str]) -> list[str]:
    """The sentences on some columns, and on the factor that is in the learning rate."""
    return [f"{name}: {text}" for name, text in explanations.items() if name in columns or name == FACTOR]


def tip_of(row: TensorRow) -> str:
    """One tensor's details in a line."""
    if not row.settled:
        return f"{row.name}: pending"
    update = ""
    if row.update_rms:
        update = f"update {row.update_rms:.3g} (RMS), / weight {moved_text(row.moved, row.update_rms)}, "
    return (
        f"{row.name}: {update}learning rate {row.learning_rate:.3g}, scale {row.scale:.4g}, g-SNR {row.gsnr:.4g}, "
        f"{row.gsnr_over_sqrt_numel:.4f} of sqrt(numel), {row.status} at step {row.step}"
    )


def _state(report: ReportData) -> str:
    return f"state {format_bytes(report.state_bytes)}, AdamW's {format_bytes(report.adamw_state_bytes)}"


def _first_cells(row: TensorRow | RouteRow) -> list[Cell]:
    layer = ("", "") if row.layer is None else (str(row.layer), row.layer)
    return [(row.name, row.name), layer, (format_shape(row.shape), row.numel)]


def _entry_texts(title: str, entry: dict[str, Any]) -> tuple[str, ...]:
    """Medians, and the learning rate's range, of an entry by kind or layer; empty where all pend."""
    first = "none" if entry[title] is None else str(entry[title])
    numbers = [""] * 7
    if entry["learning_rate_range"] is not None:
        low, high = entry["learning_rate_range"]
        steps = [str(step) for step in entry["steps"]]
        numbers = [
            moved_text(entry["moved"], entry["update_rms"]),
            f"{entry['update_rms']:.3g}" if entry["update_rms"] else "",
            f"{entry['learning_rate']:.3g}",
            f"{low:.3g} to {high:.3g}",
            f"{entry['scale']:.4g}",
            f"{entry['ratio']:.3f}",
            ", ".join(steps if len(steps) <= 3 else [*steps[:2], "...", steps[-1]]),
        ]
    return first, str(entry["tensors"]), entry["shape"], *numbers, entry["status"]
