"""What a report says, worded once for terminal, Markdown, page and picture: facts, tables and legends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..optim.lora_pairs import A_RATE
from ..optim.routing import ADAM
from .data import ReportData
from .rows import RouteRow, TensorRow, format_shape
from .schema import STATUSES


Fact = tuple[str, str]
Cell = tuple[str, Any]  # text, and what a column sorts by
ORIGIN = ("model", "date", "repository")  # facts of the run that stand in a title
FROM_ZERO = "from 0"


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
        found.append(("learning rate of a tensor", span(*rates)))
        for name, values in (
            ("update / weight", [row.moved for row in report.settled if row.moved]),
            ("update (RMS)", [row.update_rms for row in report.settled if row.update_rms]),
            ("scale", [row.scale for row in report.settled]),
            ("g-SNR / sqrt(numel)", [row.gsnr_over_sqrt_numel for row in report.settled]),
        ):
            if values:
                found.append((name, span(min(values), max(values))))
    return [*found, ("optimizer state", state)]


def settings(report: ReportData) -> list[Fact]:
    """The options that ran and the facts of the run."""
    return [(name, str(value)) for name, value in {**report.options, **report.run}.items() if name not in ORIGIN]


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

    def explanations(self, report: ReportData) -> list[str]:
        """What the columns mean, a sentence each."""
        return []


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

    def explanations(self, report: ReportData) -> list[str]:
        return [
            'route: "matrix" is whitened as it is, without state, and each of its updates has a root mean square of '
            'learning rate x scale; "transposed" is stored (in, out); "in 3 parts" is whitened as three matrices, '
            '"matrices" as one per leading index; "adam" is updated by Adam, with two moments.',
            "why: the module or the choice that decided the route.",
            "share of the elements: of all that are trained.",
        ]


class Scales(Groups):
    """The words of rows with a measured scale."""

    heading = "Scale"
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

    def explanations(self, report: ReportData) -> list[str]:
        """With what the factor of LoRA's pairs is, where there is one."""
        over = ", here from the lowest to the highest of the schedule" if report.schedule else ""
        paired = any(row.factor != 1.0 for row in report.tensors)
        found = [
            "learning rate: what the tensor's first gradient was multiplied by, at the peak: the run's learning rate "
            f"x scale{' x factor' if paired else ''}{over}."
        ]
        if paired:
            found.append(
                "factor: a pair of LoRA's factors is trained on bounded gradients (lora_policy=paired): 1 / the norm "
                f"of the gradient, or of the pair's first where that is larger, and for A {A_RATE:g} times that."
            )
        if any(row.update_rms for row in report.tensors):
            found.append(
                "update / weight: root mean square of the first update, at the peak, over that of the weights before "
                f'it; "{FROM_ZERO}" where these were all zero.'
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


def moved_text(moved: float | None, update: float | None) -> str:
    """What the first update moved the weights by; empty where nothing is known of it."""
    if moved:
        return f"{moved:.3g}"
    return FROM_ZERO if update else ""


@dataclass(frozen=True)
class Quantity:
    """
    What the cells of a map are coloured by.

    Args:
        field (`str`): Of [`TensorRow`].
        name (`str`): Beside the colours.
        title (`str`): Over the map of a picture.
        heading (`str`): Over that of a page.
    """

    field: str
    name: str
    title: str
    heading: str

    def mean(self, rows: Sequence[TensorRow]) -> float | None:
        """Geometric mean over those that have it; `None` where none has."""
        values = [value for value in (getattr(row, self.field) for row in rows) if value]
        return math.exp(sum(map(math.log, values)) / len(values)) if values else None


_HOW_FAR = "How far the first step moves each module, by depth"
MOVED = Quantity("moved", "update / weight", "how far one step moves each tensor: RMS of update / weight", _HOW_FAR)
UPDATE = Quantity("update_rms", "update (RMS)", "how far one step moves each tensor: RMS of update", _HOW_FAR)
SCALE = Quantity("scale", "scale, which multiplies the learning rate", "scale", "Scale by module and depth")


def quantity_of(report: ReportData) -> Quantity:
    """
    What says most: how far tensors move, as a share of their weights; the update alone where a matrix starts at zero,
    as LoRA's B does; the scale where a report of an older schema knows neither.
    """
    known = [row for row in report.settled if row.update_rms]
    if not known:
        return SCALE
    return UPDATE if any(row.moved is None and len(row.shape) > 1 for row in known) else MOVED


def limits_of(report: ReportData, quantity: Quantity) -> tuple[float, float]:
    """Ends of a scale of colours, in which small differences are not blown up to the whole range."""
    values = [value for value in (getattr(row, quantity.field) for row in report.settled) if value]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    spread = math.sqrt(max(1.0, 4.0 / (high / low)))
    return low / spread, high * spread


def cut(text: str, width: int = 40) -> str:
    """The end of a name that is too long for a picture."""
    return text if len(text) <= width else f"...{text[3 - width :]}"


def theory(numel: int) -> float:
    """g-SNR / sqrt(numel) of a gradient whose mean is zero: the deviation is taken with `numel - 1`."""
    return math.sqrt((numel - 1) / numel) if numel > 1 else 1.0


def folded(names: Sequence[str], least: int = 8) -> str:
    """
    The beginning that at least half of some names have in common, up to a dot and before any number: what a page does
    not repeat in every line. Empty where it is shorter than `least` letters.
    """
    prefix = ""
    while True:
        after = [name[len(prefix) :].partition(".") for name in names if name.startswith(prefix)]
        parts = Counter(part for part, dot, _ in after if dot and not part.isdigit())
        part, count = parts.most_common(1)[0] if parts else ("", 0)
        if 2 * count < len(names) or not count:
            return prefix if len(prefix) >= least else ""
        prefix += f"{part}."


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
