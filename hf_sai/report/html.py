"""A report as one HTML file that needs no network: facts, pictures with details, a table of all tensors to sort."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2

from .data import ReportData
from .facts import Cell, facts, format_bytes, origin, settings, tip_of, words_of
from .quantities import Quantity, cut, folded, limits_of, quantity_of, theory
from .rows import RouteRow, TensorRow, cells_of, layers_of, moved_most


MAX_ROWS = 20_000  # of the table; a page of 7 MB
DRAWN_ROWS = 2_000  # of them; a browser takes seconds for more, and shows the others when they are looked for
MAX_MARKS = 2_000
MAX_KINDS = 60  # of the map
MAX_LINES = 8  # of g-SNR over time
ROW_HEIGHT, LABEL_WIDTH, WIDTH, HEIGHT, MARGIN = 20, 210, 760, 260, 46
DRIFT_MARGIN = 80  # of a picture that shrinks to the width of a phone, with letters that do not
# viridis at equal distances
_COLOURS = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))


def report_html(report: ReportData) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_sai.report"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = words_of(report)
    shown = report.rows[:MAX_ROWS]
    prefix = folded([row.name for row in report.rows])
    return environment.get_template("report.html.jinja").render(
        report=report,
        origin=origin(report),
        quantity=quantity_of(report),
        prefix=prefix,
        facts=facts(report),
        settings=[*settings(report), *report.versions.items()],
        memory=_memory(report),
        map=_map(report),
        depth=_depth(report),
        drift=_drift(report),
        by_route=report.by_route(),
        second={row.route for row in report.routes if words.is_second(row)},
        total=sum(row.numel for row in report.routes) or 1,
        largest=max((entry["numel"] for entry in report.by_route()), default=1) or 1,
        heading=words.heading,
        legend=words.legend(report),
        explanations=words.explanations(report),
        columns=words.columns,
        rows=[_fold(words.cells(report, row), prefix) for row in shown[:DRAWN_ROWS]],
        more=[_plain_cells(words.columns, _fold(words.cells(report, row), prefix)) for row in shown[DRAWN_ROWS:]],
        count=len(report.rows),
    )


def _fold(cells: list[Cell], prefix: str) -> list[Cell]:
    """A row whose name begins with an ellipsis (and what keeps a line from breaking there) in place of the prefix."""
    name = cells[0][0]
    return [(f"…\u2060{name[len(prefix) :]}", name), *cells[1:]] if prefix and name.startswith(prefix) else cells


def _plain_cells(columns: Sequence[tuple[str, bool]], cells: list[Cell]) -> list[Any]:
    """A row for the page's script: texts, and of a number what it sorts by."""
    return [[*cell] if number else cell[0] for (_, number), cell in zip(columns, cells, strict=True)]


def _memory(report: ReportData) -> list[tuple[str, str, float]]:
    """Name, size and width in percent of two bars."""
    largest = max(report.state_bytes, report.adamw_state_bytes, 1)
    sizes = ((report.optimizer, report.state_bytes), ("AdamW", report.adamw_state_bytes))
    return [(name, format_bytes(size), 100.0 * size / largest) for name, size in sizes]


def _map(report: ReportData) -> dict[str, Any]:
    """One cell per kind of tensor and layer, coloured by scale or route."""
    cells = cells_of(report.rows)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    shown = {kind: index for index, kind in enumerate(kinds[:MAX_KINDS])}
    layers = _places(report.rows)
    width = max(12, min(44, (WIDTH - LABEL_WIDTH) // max(1, len(layers))))
    quantity = quantity_of(report)
    limits = limits_of(report, quantity)
    return {
        "cells": [
            {
                "x": LABEL_WIDTH + layers[layer] * width,
                "y": shown[kind] * ROW_HEIGHT,
                **_cell(report, found, quantity, limits),
            }
            for (kind, layer), found in cells.items()
            if kind in shown
        ],
        "kinds": [(cut(kind, 30), kind) for kind in shown],
        "layers": _layer_labels(layers, LABEL_WIDTH, width, every=max(1, math.ceil(24 / width))),
        "cell": width,
        "width": LABEL_WIDTH + len(layers) * width,
        "height": len(shown) * ROW_HEIGHT,
        "hidden": len(kinds) - len(shown),
        "limits": [f"{limit:.3g}" for limit in limits] if report.tensors else [],
        "colours": [_rgb(colour) for colour in _COLOURS],
    }


def _cell(report: ReportData, rows: list[Any], quantity: Quantity, limits: tuple[float, float]) -> dict[str, str]:
    style, tip = words_of(report).mark(rows)
    settled = [row for row in rows if isinstance(row, TensorRow) and row.settled]
    value = quantity.mean(settled)
    return {"class": style, "fill": "" if value is None else colour_of(value, limits), "tip": tip}


def colour_of(scale: float, limits: tuple[float, float]) -> str:
    """Of a number between two limits, by its logarithm."""
    low, high = map(math.log, limits)
    place = (math.log(scale) - low) / (high - low) * (len(_COLOURS) - 1)
    index = min(int(place), len(_COLOURS) - 2)
    mixed = [a + (b - a) * (place - index) for a, b in zip(_COLOURS[index], _COLOURS[index + 1], strict=True)]
    return _rgb(mixed)


def _depth(report: ReportData) -> dict[str, Any] | None:
    """One mark per tensor: layer against g-SNR / sqrt(numel), with what theory says of a gradient of zero mean."""
    settled = report.settled
    if not settled:
        return None
    if len(settled) > MAX_MARKS:  # the others are next to the line
        settled = sorted(settled, key=lambda row: -row.gsnr_over_sqrt_numel / theory(row.numel))[:MAX_MARKS]
    layers = _places(settled)
    kinds = {kind: index for index, kind in enumerate(dict.fromkeys(row.kind for row in settled))}
    ratios = [row.gsnr_over_sqrt_numel for row in settled]
    expected = [theory(row.numel) for row in settled]
    axis = _Axis(min(ratios + expected), max(ratios + expected))
    width = min(WIDTH, max(330, MARGIN + 10 + 60 * len(layers)))
    step = (width - MARGIN - 10) / len(layers)
    marks = []
    line: dict[str, None] = {}  # each piece once
    for row, ratio, zero_mean in zip(settled, ratios, expected, strict=True):
        beside = (kinds[row.kind] + 0.5) / len(kinds) * 0.8 + 0.1  # so that the kinds of a layer stand side by side
        x = MARGIN + (layers[row.layer] + beside) * step
        marks.append({"x": round(x, 1), "y": axis.place(ratio), "status": row.status, "tip": tip_of(row)})
        half = max(3.0, 0.4 * step / len(kinds))
        line[f"M{x - half:.1f} {axis.place(zero_mean)}h{2 * half:.1f}"] = None
    return {
        "marks": marks,
        "layers": _layer_labels(layers, MARGIN, step, every=max(1, math.ceil(30 / step))),
        "hidden": len(report.settled) - len(marks),
        "ticks": axis.ticks(),
        "line": "".join(line),
        "label": max(map(axis.place, expected)) + 16,  # no mark is under the line
        "width": width,
        "height": HEIGHT,
        "margin": MARGIN,
    }


def _drift(report: ReportData) -> dict[str, Any] | None:
    """g-SNR over time as a ratio to the first: the span of all tensors, and medians of the kinds that moved most."""
    drift = [entry for entry in report.drift() if entry["min"] > 0.0]
    if not drift:
        return None
    axis = _Axis(min([1.0, *(entry["min"] for entry in drift)]), max([1.0, *(entry["max"] for entry in drift)]))
    first, last = drift[0]["step"], drift[-1]["step"]

    def x_of(step: int) -> float:
        return round(DRIFT_MARGIN + (WIDTH - DRIFT_MARGIN - 40) * (step - first) / max(1, last - first), 1)

    lines = []
    kinds = moved_most(drift, MAX_LINES)
    for index, kind in enumerate(kinds):
        points = [(entry["step"], entry["kinds"][kind]) for entry in drift if entry["kinds"].get(kind)]
        colour = _rgb([255 * part for part in colorsys.hls_to_rgb(index / len(kinds), 0.5, 0.65)])
        marks = [
            {"x": x_of(step), "y": axis.place(ratio), "tip": f"{kind}, step {step}: {ratio:.4g} of the first"}
            for step, ratio in points
        ]
        lines.append({"kind": kind, "colour": colour, "marks": marks})
    upper = [(x_of(entry["step"]), axis.place(entry["max"])) for entry in drift]
    lower = [(x_of(entry["step"]), axis.place(entry["min"])) for entry in reversed(drift)]
    return {
        "lines": lines,
        "band": " ".join(f"{x},{y}" for x, y in upper + lower),
        "ticks": axis.ticks(),
        "steps": [(x_of(step), step) for step in sorted({first, drift[len(drift) // 2]["step"], last})],
        "one": axis.place(1.0),
        "hidden": len(drift[-1]["kinds"]) - len(kinds),
        "width": WIDTH,
        "height": HEIGHT,
        "margin": DRIFT_MARGIN,
    }


class _Axis:
    """A logarithmic axis from the bottom to the top of a picture, with a little room at both ends."""

    def __init__(self, low: float, high: float) -> None:
        room = max(0.02, 0.06 * math.log(high / low)) if low > 0.0 else 0.02
        self.low, self.high = math.log(low) - room, math.log(high) + room

    def place(self, value: float) -> float:
        return round(HEIGHT - HEIGHT * (math.log(value) - self.low) / (self.high - self.low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        values = [math.exp(self.low + (self.high - self.low) * part) for part in (0.05, 0.35, 0.65, 0.95)]
        return [(self.place(value), f"{value:.3g}") for value in values]


def _places(rows: Iterable[TensorRow | RouteRow]) -> dict[int | None, int]:
    """Place of each layer."""
    return {layer: index for index, layer in enumerate(layers_of(rows))}


def _layer_labels(layers: dict[int | None, int], start: float, step: float, every: int) -> list[tuple[float, Any]]:
    """Place and text under the layers of a picture, as many as can be read."""
    shown = list(layers.items())[::every]
    return [(round(start + (index + 0.5) * step, 1), "none" if layer is None else layer) for layer, index in shown]


def _rgb(colour: Iterable[float]) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in colour)
