"""Pictures of a report: what moved how far, rates and scales; g-SNR over time; SWAN's routes; two runs compared."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Callable
from textwrap import shorten
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .compare import Comparison
from .data import ReportData
from .facts import origin, span, words_of
from .quantities import FROM_ZERO, Quantity, cut, limits_of, quantity_of
from .rows import TensorRow, cells_of, layers_of, moved_most


MAX_KINDS = 24
MAX_LINES = 9
PENDING_COLOUR, FALLBACK_COLOUR, POINT_COLOUR, ADAM_COLOUR = "#d9d9d9", "#d1495b", "#2a6f97", "#e09f3e"
_COLOURS = (POINT_COLOUR, ADAM_COLOUR)
_PENDING: dict[str, Any] = {"facecolor": "#f2f2f2", "edgecolor": PENDING_COLOUR, "hatch": "////", "lw": 0}
_FALLBACK: dict[str, Any] = {"edgecolor": FALLBACK_COLOUR, "lw": 2}
_P = ParamSpec("_P")
_T = TypeVar("_T")
Cells = dict[tuple[str, int | None], list[TensorRow]]


def _own_style(draw: Callable[_P, _T]) -> Callable[_P, _T]:
    """Draws with matplotlib's own defaults, whatever a matplotlibrc says of fonts and TeX; a letter that the font does
    not have is a box, and no warning."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with matplotlib.rc_context(), warnings.catch_warnings():
            matplotlib.rcdefaults()
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            return draw(*args, **kwargs)

    return drawn


def report_png(report: ReportData) -> bytes:
    """[`report_figure`] as PNG, 1500 pixels wide; of SWAN 1000."""
    return _png(report_figure, report)


@_own_style
def report_figure(report: ReportData) -> Figure:
    """
    The picture of a run.

    First how far one step moves each tensor: a cell per kind and layer, coloured by the root mean square of the first
    update over that of the weights, or by the update alone where matrices start at zero, as LoRA's B do. Hatched is
    what is pending, framed in red what is a fallback. Then the learning rate that each tensor got, and last its scale
    against its size, with the line that a gradient of zero mean would give. Of SWAN: the share of the elements by kind
    of tensor, coloured by what is whitened and what goes to Adam.
    """
    return _FIGURES[report.kind](report)


def _scales_figure(report: ReportData) -> Figure:
    cells = cells_of(report.tensors)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    shown = kinds[:MAX_KINDS]
    figure = Figure(figsize=(15, max(4.8, 0.34 * len(shown) + 2.4)), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.9, 0.8, 1])
    _draw_cells(figure, left, report, cells, shown, hidden=len(kinds) - len(shown))
    _draw_rates(middle, report, shown)
    _draw_against_size(right, report)
    _title(figure, report)
    return figure


def _title(figure: Figure, report: ReportData) -> None:
    about = [report.optimizer, *filter(None, [origin(report)])]
    lines = [shorten(", ".join(about), 110, placeholder="..."), words_of(report).headline(report)]
    figure.suptitle("\n".join(lines), fontsize=13, x=0.01, ha="left", weight="bold", parse_math=False)


def diff_png(diff: Comparison, ratio: float | None = None) -> bytes:
    """[`diff_figure`] as PNG, 800 pixels wide."""
    return _png(diff_figure, diff, ratio)


@_own_style
def diff_figure(diff: Comparison, ratio: float | None = None) -> Figure:
    """
    One point per tensor that both runs have: its value in the first run against that in the second, with the line
    where they are equal. What is further apart than `ratio` is red, and the band is drawn.
    """
    figure = Figure(figsize=(8, 7), dpi=100, layout="constrained")
    axes: Any = figure.subplots()
    both = [row for row in diff.rows if row.ratio is not None]
    apart = [] if ratio is None else [row for row in both if row.is_apart(ratio)]
    for rows, colour, label in (
        ([row for row in both if row not in apart], POINT_COLOUR, "tensors of both"),
        (apart, FALLBACK_COLOUR, f"further apart than {ratio:g}, or of another shape" if ratio is not None else ""),
    ):
        if rows:
            x, y = zip(*(row.values(diff.quantity) for row in rows), strict=True)
            axes.scatter(x, y, s=34, color=colour, alpha=0.7, lw=0, label=f"{label}: {len(rows)}")
    values = [value for row in both for value in row.values(diff.quantity)] or [1.0]
    ends = [min(values) / 1.3, max(values) * 1.3]
    axes.plot(ends, ends, color="#888888", lw=1, zorder=0, label="equal")
    if ratio is not None:
        low, high = [[end * factor for end in ends] for factor in (1.0 / ratio, ratio)]
        axes.fill_between(ends, low, high, color="#eeeeee", lw=0, zorder=-1, label=f"within a factor of {ratio:g}")
    axes.legend(loc="upper left", fontsize=9, frameon=False)
    _log_axes(axes, f"{diff.quantity} in the first run", f"{diff.quantity} in the second run", diff.headline())
    return figure


def _routes_figure(report: ReportData) -> Figure:
    entries = sorted(report.by_route(), key=lambda entry: entry["numel"], reverse=True)
    total = sum(entry["numel"] for entry in entries) or 1
    shown, hidden = entries[:MAX_KINDS], entries[MAX_KINDS:]
    figure = Figure(figsize=(10, max(3.0, 0.34 * len(shown) + 1.6)), dpi=100, layout="constrained")
    axes: Any = figure.subplots()
    shares = [100.0 * entry["numel"] / total for entry in shown]
    words = words_of(report)
    second = {row.route for row in report.routes if words.is_second(row)}
    colours = [_COLOURS[entry["route"] in second] for entry in shown]
    axes.barh(range(len(shown)), shares, color=colours, height=0.8)
    for y, (entry, share) in enumerate(zip(shown, shares, strict=True)):
        times = f"{entry['tensors']} x {entry['shape']}" if entry["tensors"] > 1 else entry["shape"]
        text = f" {share:.2g}%  {shorten(entry['reason'], 60)}, {times}"
        axes.text(share, y, text, va="center", fontsize=9, color="#333333", parse_math=False)
    axes.set_yticks(range(len(shown)), [cut(entry["kind"]) for entry in shown], fontsize=9, parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, max(shares, default=1.0) * 1.6)
    axes.set_xlabel(
        "% of the trained elements" + f" (the largest {len(shown)} of {len(entries)} kinds)" * bool(hidden)
    )
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Line2D([], [], color=_COLOURS[bool(second)], marker="s", lw=0, label=text)
        for second, text in words.legend(report)
    ]
    if handles:
        axes.legend(handles=handles, loc="lower right", fontsize=9, frameon=False)
    _title(figure, report)
    return figure


@_own_style
def _png(draw: Callable[..., Figure], *args: Any) -> bytes:
    buffer = io.BytesIO()
    draw(*args).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def history_png(report: ReportData) -> bytes:
    """
    g-SNR over training as PNG, 1000 pixels wide: the median of each kind of tensor, as a ratio to its first
    measurement, and the span of all tensors in grey.
    """
    return _png(_history_figure, report)


def _history_figure(report: ReportData) -> Figure:
    drift = report.drift()
    steps = [entry["step"] for entry in drift]
    figure = Figure(figsize=(10, 5), dpi=100, layout="constrained")
    axes: Any = figure.subplots()
    spans = [[entry[key] for entry in drift] for key in ("min", "max")]
    axes.fill_between(steps, *spans, color="#dddddd", lw=0, label="all tensors")
    apart = moved_most(drift, MAX_LINES)
    for kind in apart:
        label = cut(kind).replace("$", r"\$")
        axes.plot(steps, [entry["kinds"].get(kind, math.nan) for entry in drift], marker=".", label=label)
    axes.axhline(1.0, color="#888888", lw=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("g-SNR, ratio to the first measurement")
    others = f"; the {len(apart)} kinds that moved most" if len(drift[-1]["kinds"]) > len(apart) else ""
    axes.set_title(f"g-SNR over training: medians by kind of tensor{others}", loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def lr_test_png(found: Any) -> bytes:
    """The trials of a [`hf_sai.lr_test.LRTest`] as PNG, 1100 pixels wide."""
    return _png(_lr_test_figure, found)


def _lr_test_figure(found: Any) -> Figure:
    """Every trial's losses; and what each rate ended at, with the suggestion."""
    figure = Figure(figsize=(11, 4.6), dpi=100, layout="constrained")
    curves, ends = figure.subplots(1, 2)
    colours = matplotlib.colormaps["viridis_r"]
    usual = [loss for trial in found.trials if trial.last for loss in trial.losses] or [0.0, 1.0]
    margin = 0.1 * (max(usual) - min(usual)) or 0.1
    for index, trial in enumerate(found.trials):
        label = f"{trial.learning_rate:.2g}" + ("" if trial.last else ", diverged")
        colour = colours((index + 1) / len(found.trials))
        curves.plot(range(1, len(trial.losses) + 1), trial.losses, color=colour, label=label, marker=".")
    curves.set_ylim(min(usual) - margin, max(usual) + margin)
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.set_xlabel("update")
    curves.set_ylabel("loss of its batches, before it")
    curves.legend(title="learning rate", fontsize=8, frameon=False)
    ended = [trial for trial in found.trials if trial.last]
    x = [trial.learning_rate for trial in ended]
    ends.plot(x, [trial.score for trial in ended], color=POINT_COLOUR, marker="o")
    for trial in found.trials:
        if not trial.last:
            ends.axvline(trial.learning_rate, color=FALLBACK_COLOUR, lw=1, ls=":", label="diverged")
    ends.axvline(found.given, color="#888888", lw=1, ls="--", label=f"yours: {found.given:g}")
    if found.suggestion is not None:
        ends.axvline(found.suggestion, color=ADAM_COLOUR, lw=2, label=f"suggestion: {found.suggestion:g}")
    handles = dict(zip(*reversed(ends.get_legend_handles_labels()), strict=True))
    ends.legend(handles.values(), handles.keys(), fontsize=9, frameon=False)
    ends.set_xscale("log")
    ends.set_xlabel("learning rate")
    ends.set_ylabel("mean loss of the last updates")
    figure.suptitle(f"{found.optimizer}: short trainings from one start", fontsize=12, x=0.01, ha="left")
    for axes in (curves, ends):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_cells(figure: Figure, axes: Any, report: ReportData, cells: Cells, kinds: list[str], hidden: int) -> None:
    layers = layers_of(report.tensors)
    quantity = quantity_of(report)
    mappable = axes.scatter([], [], c=[], norm=LogNorm(*limits_of(report, quantity)), cmap="viridis")
    write_values = len(layers) <= 14
    for (kind, layer), rows in cells.items():
        if kind in kinds:
            _draw_cell(axes, rows, layers.index(layer), kinds.index(kind), mappable, quantity, write_values)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    step = max(1, len(layers) // 20)
    axes.set_xticks(range(0, len(layers), step), ["none" if x is None else str(x) for x in layers[::step]])
    axes.set_yticks(range(len(kinds)), [cut(kind) for kind in kinds], fontsize=9, parse_math=False)  # may hold a $
    axes.set_xlabel("layer (none: outside the blocks)" if None in layers else "layer")
    more = f" (first {len(kinds)} of {len(kinds) + hidden} kinds)" if hidden else ""
    axes.set_title(f"{quantity.title}{more}", fontsize=11, loc="left")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if report.settled:
        bar = figure.colorbar(mappable, ax=axes, pad=0.01)
        _plain_numbers(bar.ax.yaxis)
    marks = []
    if report.by_status("pending"):
        marks.append(Patch(**_PENDING, label="pending, no gradient yet"))
    if report.by_status("fallback"):
        marks.append(Patch(facecolor="white", **_FALLBACK, label="fallback, no deviation"))
    if marks:
        figure.legend(handles=marks, loc="outside lower left", ncols=2, fontsize=9, frameon=False)


def _draw_cell(
    axes: Any, rows: list[TensorRow], x: int, y: int, mappable: Any, quantity: Quantity, write_value: bool
) -> None:
    settled = [row for row in rows if row.settled]
    if not settled:
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, **_PENDING))
        if write_value:
            axes.text(x, y, "pending", ha="center", va="center", fontsize=8, color="#444444")
        return
    value = quantity.mean(settled)
    colour = (0.94, 0.94, 0.94, 1.0) if value is None else mappable.to_rgba(value)
    frame = _FALLBACK if any(row.status == "fallback" for row in settled) else {"lw": 0}
    axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, **frame))
    if write_value:
        luminance = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
        text = FROM_ZERO if value is None else f"{value:.2g}"
        shade = "black" if luminance > 0.5 else "white"
        axes.text(x, y, text, ha="center", va="center", fontsize=8, color=shade)


def _draw_rates(axes: Any, report: ReportData, kinds: list[str]) -> None:
    """The learning rate of every tensor, in the lines of the map beside it."""
    places = {kind: index for index, kind in enumerate(kinds)}
    rows = [row for row in report.settled if row.kind in places and row.learning_rate > 0.0]
    for fallback in (False, True):
        some = [row for row in rows if (row.status == "fallback") == fallback]
        _scatter(axes, [row.learning_rate for row in some], [places[row.kind] for row in some], fallback)
    if rows:
        low, high = (end(row.learning_rate for row in rows) for end in (min, max))
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis, (1.0, 2.0, 5.0) if high < 10 * low else (1.0, 3.0) if high < 100 * low else (1.0,))
        if high < 3 * low:
            axes.set_xticks([low, high] if high > 1.1 * low else [low])
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_yticks(range(len(kinds)), [""] * len(kinds))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_title("learning rate of each tensor", fontsize=11, loc="left")
    axes.set_xlabel("at the peak, scale and factor included")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _scatter(axes: Any, x: list[float], y: list[float], fallback: bool) -> None:
    marker, colour = ("s", FALLBACK_COLOUR) if fallback else ("o", POINT_COLOUR)
    axes.scatter(x, y, marker=marker, s=34, color=colour, alpha=0.7, lw=0)


def _draw_against_size(axes: Any, report: ReportData) -> None:
    settled = report.settled
    pending = report.by_status("pending")
    normalizer = report.normalizer
    floor = min((row.scale for row in settled), default=1.0) / 2
    for fallback in (False, True):
        rows = [row for row in settled if (row.status == "fallback") == fallback]
        _scatter(axes, [math.sqrt(row.numel) for row in rows], [row.scale for row in rows], fallback)
    if pending:
        x = [math.sqrt(row.numel) for row in pending]
        axes.scatter(x, [floor] * len(x), marker="v", s=40, facecolor="white", edgecolor="#555555")
    sizes = sorted({row.numel for row in report.tensors if row.numel > 1})
    if sizes:
        x = [math.sqrt(size) for size in sizes]
        line = [math.sqrt(size - 1) / normalizer for size in sizes]
        axes.plot(x, line, color="#888888", lw=1, zorder=0, marker="_", ms=12)
    axes.legend(handles=_legend(settled, pending), loc="upper left", fontsize=9, frameon=False)
    ratios = [row.gsnr_over_sqrt_numel for row in settled]
    title = f"g-SNR / sqrt(n): {span(min(ratios), max(ratios))}" if ratios else "scale against size"
    _log_axes(axes, "sqrt(n), n: number of elements", "scale", title)


def _log_axes(axes: Any, x: str, y: str, title: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _plain_numbers(axis: Any, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """20, not 2 x 10^1; as many ticks as can be read."""
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _legend(settled: list[TensorRow], pending: list[TensorRow]) -> list[Any]:
    fallback = sum(row.status == "fallback" for row in settled)
    given = sum(row.status == "given" for row in settled)
    label = f"given: {given}" if given else f"measured: {len(settled) - fallback}"
    handles: list[Any] = [Line2D([], [], color=POINT_COLOUR, marker="o", lw=0, label=label)]
    if fallback:
        label = f"fallback, no deviation: {fallback}"
        handles.append(Line2D([], [], color=FALLBACK_COLOUR, marker="s", lw=0, label=label))
    if pending:
        label = f"pending, no gradient yet: {len(pending)}"
        style: dict[str, Any] = {"marker": "v", "markerfacecolor": "white", "markeredgecolor": "#555555", "lw": 0}
        handles.append(Line2D([], [], label=label, **style))
    return [*handles, Line2D([], [], color="#888888", lw=1, label="sqrt(n - 1): a gradient of zero mean")]


_FIGURES = {"scales": _scales_figure, "routes": _routes_figure, "groups": _routes_figure}
