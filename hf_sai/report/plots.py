"""Pictures of a report: scales by kind, layer and size; g-SNR over time; SWAN's routes; two runs compared."""

from __future__ import annotations

import io
import math
from textwrap import shorten
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .compare import Comparison
from .data import ReportData
from .facts import words_of
from .rows import TensorRow, cells_of, layers_of, mean_scale, moved_most, scale_limits


MAX_KINDS = 24
MAX_LINES = 9
PENDING_COLOUR, FALLBACK_COLOUR, POINT_COLOUR, ADAM_COLOUR = "#d9d9d9", "#d1495b", "#2a6f97", "#e09f3e"
_COLOURS = (POINT_COLOUR, ADAM_COLOUR)
Cells = dict[tuple[str, int | None], list[TensorRow]]


def report_png(report: ReportData) -> bytes:
    """[`report_figure`] as PNG, 1500 pixels wide; of SWAN 1000."""
    return _png(report_figure(report))


def report_figure(report: ReportData) -> Figure:
    """
    The picture of a run.

    Left: one cell per kind of tensor and layer, coloured by scale; hatched where it is pending, framed in red where it
    is a fallback. Right: scale against sqrt(numel), with the line that a gradient of zero mean would give. Of SWAN:
    the share of the elements by kind of tensor, coloured by what is whitened and what goes to Adam.
    """
    return _FIGURES[report.kind](report)


def _scales_figure(report: ReportData) -> Figure:
    cells = cells_of(report.tensors)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    shown = kinds[:MAX_KINDS]
    figure = Figure(figsize=(15, max(4.8, 0.34 * len(shown) + 2.4)), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    _draw_cells(figure, left, report, cells, shown, hidden=len(kinds) - len(shown))
    _draw_against_size(right, report)
    figure.suptitle(words_of(report).headline(report), fontsize=13, x=0.01, ha="left", weight="bold")
    return figure


def diff_png(diff: Comparison, ratio: float | None = None) -> bytes:
    """[`diff_figure`] as PNG, 800 pixels wide."""
    return _png(diff_figure(diff, ratio))


def diff_figure(diff: Comparison, ratio: float | None = None) -> Figure:
    """
    One point per tensor that both runs have: its value in the first run against that in the second, with the line
    where they are equal.

    Args:
        diff (`Comparison`): The comparison.
        ratio (`float`, *optional*): What is further apart than this is red, and the band is drawn.
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
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_xlabel(f"{diff.quantity} in the first run")
    axes.set_ylabel(f"{diff.quantity} in the second run")
    axes.set_title(diff.headline(), loc="left", fontsize=11)
    axes.legend(loc="upper left", fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
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
    axes.set_yticks(range(len(shown)), [entry["kind"] for entry in shown], fontsize=9, parse_math=False)
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
    figure.suptitle(words.headline(report), fontsize=13, x=0.01, ha="left", weight="bold")
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def history_png(report: ReportData) -> bytes:
    """
    g-SNR over training as PNG, 1000 pixels wide: the median of each kind of tensor, as a ratio to its first
    measurement, and the span of all tensors in grey.
    """
    drift = report.drift()
    steps = [entry["step"] for entry in drift]
    figure = Figure(figsize=(10, 5), dpi=100, layout="constrained")
    axes: Any = figure.subplots()
    spans = [[entry[key] for entry in drift] for key in ("min", "max")]
    axes.fill_between(steps, *spans, color="#dddddd", lw=0, label="all tensors")
    apart = moved_most(drift, MAX_LINES)
    for kind in apart:
        label = kind.replace("$", r"\$")
        axes.plot(steps, [entry["kinds"].get(kind, math.nan) for entry in drift], marker=".", label=label)
    axes.axhline(1.0, color="#888888", lw=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("g-SNR, ratio to the first measurement")
    others = f"; the {len(apart)} kinds that moved most" if len(drift[-1]["kinds"]) > len(apart) else ""
    axes.set_title(f"g-SNR over training: medians by kind of tensor{others}", loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _draw_cells(figure: Figure, axes: Any, report: ReportData, cells: Cells, kinds: list[str], hidden: int) -> None:
    layers = layers_of(report.tensors)
    mappable = axes.scatter([], [], c=[], norm=LogNorm(*scale_limits(report.tensors)), cmap="viridis")
    write_values = len(layers) <= 14
    for (kind, layer), rows in cells.items():
        if kind in kinds:
            _draw_cell(axes, rows, layers.index(layer), kinds.index(kind), mappable, write_values)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    step = max(1, len(layers) // 20)
    axes.set_xticks(range(0, len(layers), step), ["none" if x is None else str(x) for x in layers[::step]])
    axes.set_yticks(range(len(kinds)), kinds, fontsize=9, parse_math=False)  # a name may hold a $
    axes.set_xlabel("layer (none: outside the blocks)" if None in layers else "layer")
    more = f" (first {len(kinds)} of {len(kinds) + hidden} kinds)" if hidden else ""
    axes.set_title(f"scale by kind and layer{more}", fontsize=11, loc="left")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if report.settled:
        bar = figure.colorbar(mappable, ax=axes, label="scale (the learning rate is multiplied by it)", pad=0.01)
        _plain_numbers(bar.ax.yaxis)


def _draw_cell(axes: Any, rows: list[TensorRow], x: int, y: int, mappable: Any, write_value: bool) -> None:
    settled = [row for row in rows if row.settled]
    if not settled:
        stroke: dict[str, Any] = {"facecolor": "#f2f2f2", "edgecolor": PENDING_COLOUR, "hatch": "////", "lw": 0}
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, **stroke))
        if write_value:
            axes.text(x, y, "pending", ha="center", va="center", fontsize=8, color="#444444")
        return
    scale = mean_scale(settled)
    fallback = any(row.status == "fallback" for row in settled)
    colour = mappable.to_rgba(scale)
    frame: dict[str, Any] = {"edgecolor": FALLBACK_COLOUR, "lw": 2} if fallback else {"lw": 0}
    axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, **frame))
    if write_value:
        luminance = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
        axes.text(
            x, y, f"{scale:.3g}", ha="center", va="center", fontsize=8, color="black" if luminance > 0.5 else "white"
        )


def _draw_against_size(axes: Any, report: ReportData) -> None:
    settled = report.settled
    pending = report.by_status("pending")
    normalizer = report.normalizer
    floor = min((row.scale for row in settled), default=1.0) / 2
    for fallback, marker, colour in ((False, "o", POINT_COLOUR), (True, "s", FALLBACK_COLOUR)):
        rows = [row for row in settled if (row.status == "fallback") == fallback]
        x = [math.sqrt(row.numel) for row in rows]
        axes.scatter(x, [row.scale for row in rows], marker=marker, s=34, color=colour, alpha=0.7, lw=0)
    if pending:
        x = [math.sqrt(row.numel) for row in pending]
        axes.scatter(x, [floor] * len(x), marker="v", s=40, facecolor="white", edgecolor="#555555")
    sizes = sorted(math.sqrt(row.numel) for row in report.tensors if row.numel)
    if sizes:
        ends = [sizes[0] / 1.2, sizes[-1] * 1.2]
        axes.plot(ends, [end / normalizer for end in ends], color="#888888", lw=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("sqrt(number of elements)")
    axes.set_ylabel("scale")
    axes.set_title(_ratio_title(settled), fontsize=11, loc="left")
    axes.legend(handles=_legend(settled, pending), loc="upper left", fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_numbers(axis: Any) -> None:
    """20, not 2 x 10^1; as many ticks as can be read."""
    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _ratio_title(settled: list[TensorRow]) -> str:
    ratios = [row.gsnr_over_sqrt_numel for row in settled]
    if not ratios:
        return "scale against size"
    return f"g-SNR is {min(ratios):.4g} to {max(ratios):.4g} times sqrt(numel)"


def _legend(settled: list[TensorRow], pending: list[TensorRow]) -> list[Any]:
    fallback = sum(row.status == "fallback" for row in settled)
    given = sum(row.status == "given" for row in settled)
    label = f"given: {given}" if given else f"measured: {len(settled) - fallback}"
    handles: list[Any] = [Line2D([], [], color=POINT_COLOUR, marker="o", lw=0, label=label)]
    if fallback:
        label = f"fallback, no deviation: {fallback} (red frame at left)"
        handles.append(Line2D([], [], color=FALLBACK_COLOUR, marker="s", lw=0, label=label))
    if pending:
        label = f"pending, no gradient yet: {len(pending)} (hatched at left)"
        style: dict[str, Any] = {"marker": "v", "markerfacecolor": "white", "markeredgecolor": "#555555", "lw": 0}
        handles.append(Line2D([], [], label=label, **style))
    return [*handles, Line2D([], [], color="#888888", lw=1, label="sqrt(numel): a gradient of zero mean")]


_FIGURES = {"scales": _scales_figure, "routes": _routes_figure, "groups": _routes_figure}
