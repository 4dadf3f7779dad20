"""What tells most of a run's tensors: how far they moved, against what theory says, and names that a page can show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .data import ReportData
from .rows import TensorRow


FROM_ZERO = "from 0"


@dataclass(frozen=True)
class Quantity:
    """What the cells of a map are coloured by."""

    field: str  # of a TensorRow
    name: str  # beside the colours
    title: str  # over the map of a picture
    heading: str  # over that of a page

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


def moved_text(moved: float | None, update: float | None) -> str:
    """What the first update moved the weights by; empty where nothing is known of it."""
    if moved:
        return f"{moved:.3g}"
    return FROM_ZERO if update else ""
