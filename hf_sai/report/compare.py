"""The scales of two runs, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

from ..optimizer_facts import defaults_of
from .data import ReportData
from .rows import TensorRow
from .schema import ReportError


@dataclasses.dataclass(frozen=True)
class DiffRow:
    """One tensor in two runs."""

    name: str  # the parameter's, the same in both
    first: TensorRow | None  # in the first run; None where it has no such tensor
    second: TensorRow | None
    ratio: float | None  # second over first of what is compared; None where one of them has none

    @property
    def missing(self) -> str:
        """Why there is no ratio: `"not in first"`, `"pending in second"`, ...; empty where nothing is amiss."""
        sides = {"first": self.first, "second": self.second}
        absent = [f"not in {side}" for side, row in sides.items() if row is None]
        pending = [f"pending in {side}" for side, row in sides.items() if row is not None and not row.settled]
        return "" if len(pending) == 2 else ", ".join([*absent, *pending])

    @property
    def reshaped(self) -> bool:
        """Whether both have it, in different shapes."""
        return self.first is not None and self.second is not None and self.first.shape != self.second.shape

    def values(self, quantity: str) -> tuple[float, float]:
        """First and second of what is compared, where there is a ratio."""
        if self.first is None or self.second is None:
            raise ValueError(f"only a tensor of both runs has two values but {self.name} is {self.missing}")
        field = "scale" if quantity == "scale" else "gsnr"
        return getattr(self.first, field), getattr(self.second, field)

    def is_apart(self, ratio: float) -> bool:
        """
        Whether a comparison with that bound fails here: the ratio is above it or below its reciprocal, the tensor is
        missing or pending in one run only, or the shapes differ.
        """
        beyond = self.ratio is not None and not 1.0 / ratio <= self.ratio <= ratio
        return beyond or bool(self.missing) or self.reshaped


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs compared, as data."""

    quantity: str  # what is compared: "scale", or "g-SNR" where the runs normalise differently
    rows: list[DiffRow]  # one per tensor of either run, in the order of the first
    notes: list[str]  # what else differs and matters, in sentences

    def apart(self, ratio: float) -> list[DiffRow]:
        """
        The rows that fail; see [`DiffRow.is_apart`]. A `ratio` that is not a finite number from 1 is a
        `ValueError`.
        """
        if not (math.isfinite(ratio) and ratio >= 1.0):
            raise ValueError(f"the ratio of a comparison must be a finite number from 1 but is {ratio:g}; try 1.1")
        return [row for row in self.rows if row.is_apart(ratio)]

    def headline(self) -> str:
        """One line: how many tensors both have, how far they are apart, and how many one run lacks."""
        ratios = [row.ratio for row in self.rows if row.ratio is not None]
        parts = [f"{len(ratios)} tensors in both runs"]
        if ratios:
            parts.append(f"{self.quantity} second / first {min(ratios):.4g} to {max(ratios):.4g}")
        lacking = sum(bool(row.missing) for row in self.rows)
        reshaped = sum(row.reshaped for row in self.rows)
        parts += [f"{lacking} missing or pending in one"] if lacking else []
        parts += [f"{reshaped} of another shape"] if reshaped else []
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: `quantity`, `notes`, and `tensors` with both sides."""
        return {"quantity": self.quantity, "notes": self.notes, "tensors": [_plain(row) for row in self.rows]}

    @classmethod
    def of(cls, first: ReportData, second: ReportData) -> Self:
        """
        Compares two runs. Tensors are the same where their names are.

        Scales are compared as they were used. Where one run divides them by the largest g-SNR and the other does not,
        all would differ by that factor, and g-SNR is compared instead; a note says so. A run without scales is a
        `ReportError`.
        """
        for which, report in (("first", first), ("second", second)):
            if report.kind != "scales":
                raise ReportError(
                    f"a comparison needs the scales of two runs but the {which} is of {report.optimizer}, which has "
                    "none; give reports of sgd_sai"
                )
        normalizations = [report.options.get("normalize", "none") for report in (first, second)]
        quantity = "scale" if normalizations[0] == normalizations[1] else "g-SNR"
        rows = [{row.name: row for row in report.tensors} for report in (first, second)]
        names = list(dict.fromkeys([*rows[0], *rows[1]]))
        return cls(
            quantity,
            [_row(name, rows[0].get(name), rows[1].get(name), quantity) for name in names],
            _notes(first, second, normalizations),
        )


def _row(name: str, first: TensorRow | None, second: TensorRow | None, quantity: str) -> DiffRow:
    row = DiffRow(name, first, second, None)
    if first is None or second is None or not (first.settled and second.settled):
        return row
    old, new = row.values(quantity)
    return dataclasses.replace(row, ratio=new / old)


def _notes(first: ReportData, second: ReportData, normalizations: list[Any]) -> list[str]:
    notes = []
    if normalizations[0] != normalizations[1]:
        divided = {normalizations[at]: report.normalizer for at, report in enumerate((first, second))}
        divisors = {"max": "the largest g-SNR", "rms": "the RMS of the first gradient times its scales"}
        how = [f"{each} divides by {divisors[each]} ({divided[each]:.4g})" for each in divisors if each in divided]
        notes.append(
            f"The runs normalise differently (first {normalizations[0]}, second {normalizations[1]}): "
            f"{' and '.join(how)}. g-SNR is compared here, and the learning rate of the one is not one for the other."
        )
    notes += _other_options(first, second)
    rates = [report.learning_rate for report in (first, second)]
    batches = [report.run.get("effective_batch_size") for report in (first, second)]
    if rates[0] != rates[1]:
        notes.append(f"The peak learning rate is {rates[0]:g} in the first run and {rates[1]:g} in the second.")
    if batches[0] != batches[1] and None not in batches:
        notes.append(f"The batch that was measured is {batches[0]} in the first run and {batches[1]} in the second.")
    return notes


_MEANING = {
    "lora_policy": ": pairs are trained on bounded gradients, so that equal scales are no equal steps, and the "
    "learning rate of the one is not one for the other"
}


def _other_options(first: ReportData, second: ReportData) -> list[str]:
    """
    A sentence for each option that differs, but for `normalize`, which has one of its own. An older report lacks some:
    it is then taken for the default, as it was.
    """
    notes = []
    for name in dict.fromkeys([*first.options, *second.options]):
        values = [_option(report, name) for report in (first, second)]
        if values[0] != values[1] and name != "normalize":
            more = _MEANING.get(name, "")
            notes.append(f"{name} is {values[0]} in the first run and {values[1]} in the second{more}.")
    return notes


def _option(report: ReportData, name: str) -> Any:
    return {**defaults_of(report.optimizer), **report.options}.get(name)


def _plain(row: DiffRow) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "missing": row.missing, "reshaped": row.reshaped}
