"""What a report file may hold: everything is checked, by field, before anything is made of it."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


SCHEMA = 3
# By schema: where the fields are that it added, and what they are in a file of an older one.
_ADDED: dict[int, tuple[str, dict[str, Any]]] = {
    2: ("", {"schedule": []}),
    3: ("tensors", {"factor": 1.0, "gradient_norm": 0.0, "weight_rms": 0.0}),
}
# A model of 100,000 trained tensors has a report of 32 MB with 1.4 million items; see also `thinned`.
MAX_BYTES = 64 * 2**20
MAX_ITEMS = 4_000_000
MAX_DEPTH = 8
MAX_DIMENSIONS = 64
SMALLEST, LARGEST = 1e-30, 1e30  # of a g-SNR or scale; logarithms and ratios of such are finite
HISTORY_VALUES = 200_000  # about 20 MB
STATUSES = ("measured", "given", "fallback", "pending")


class ReportError(ValueError):
    """A report that can't be read or used; the message names the field."""


def read_text(file: Path) -> str:
    """The text of a report file; a `ReportError` where it can't be read, is larger than any report, or is no text."""
    try:
        size = file.stat().st_size
        content = file.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise ReportError(
            f"a g-SNR report must be a file that can be read but {file.name}: {error.strerror}"
        ) from None
    if size > MAX_BYTES:
        raise ReportError(
            f"a g-SNR report must have at most {MAX_BYTES:,} bytes but {file.name} has {size:,}; it is another file"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReportError(
            f"a g-SNR report must be JSON in UTF-8 but {file.name} is not text at byte {error.start}; write it again "
            "with save()"
        ) from None


def parse(text: str) -> dict[str, Any]:
    """
    The fields of a report from JSON, those of an older schema brought to this one, without the schema's number.

    A number that is too large or none becomes one that is not finite, so that the field's own check can name it.
    """
    if len(text) > MAX_BYTES or sum(map(text.count, ",[{")) > MAX_ITEMS:
        raise ReportError(
            f"a g-SNR report must have at most {MAX_ITEMS:,} items in {MAX_BYTES:,} characters but this has "
            "more; it is another file"
        )
    try:
        content = json.loads(text, parse_int=_whole, parse_constant=float, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ReportError(
            f"a g-SNR report must be nested at most {MAX_DEPTH} deep but is deeper; {_DAMAGED}"
        ) from None
    except json.JSONDecodeError as error:
        raise ReportError(f"a g-SNR report must be JSON but: {error}; write it again with save()") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        found = reprlib.repr(schema) if isinstance(content, dict) else f"that of a {type(content).__name__}"
        raise ReportError(
            f"schema must be {' or '.join(map(str, range(1, SCHEMA + 1)))} but is {found}; a newer hf_sai wrote it, "
            "or it is no g-SNR report"
        )
    fields = {key: value for key, value in content.items() if key != "schema"}
    for added in range(schema + 1, SCHEMA + 1):
        place, new = _ADDED[added]
        rows = fields.get(place) if place else [fields]
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict):
                row.update({**new, **row})
    return fields


def build(cls: type[Any], fields: Any, where: str = "") -> Any:
    """
    An instance of a dataclass from JSON, with every field there, of its type and in its range; a `ReportError` names
    the field, and `where` it stands, such as `"tensors[3]"` (empty at the top).
    """
    if not isinstance(fields, dict):
        raise _wrong(where, "a dict", fields)
    expected = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    if fields.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - fields.keys()), sorted(fields.keys() - expected.keys())
        parts = [
            f"{word}: {reprlib.repr(names)}" for word, names in (("missing", missing), ("unknown", unknown)) if names
        ]
        raise ReportError(
            f"{where or 'the top'} of a g-SNR report must have its own fields but has {', '.join(parts)}; {_DAMAGED}"
        )
    prefix = f"{where}." if where else ""
    return cls(**{name: _checked(fields[name], annotation, prefix + name) for name, annotation in expected.items()})


def rows(cls: type[Any], values: Any, where: str) -> list[Any]:
    """A list of instances whose values fit each other; see [`build`]."""
    if not isinstance(values, list):
        raise _wrong(where, "a list", values)
    built = [build(cls, value, f"{where}[{index}]") for index, value in enumerate(values)]
    for index, row in enumerate(built):
        _check_row(f"{where}[{index}]", row)
    return built


def check_history(values: Any) -> None:
    """Refuses measurements over time of which one is not a step and g-SNR by name."""
    if not isinstance(values, list):
        raise _wrong("history", "a list", values)
    for index, entry in enumerate(values):
        where = f"history[{index}]"
        if not isinstance(entry, dict) or entry.keys() != {"step", "gsnr"} or not isinstance(entry["gsnr"], dict):
            raise _wrong(where, "a step and g-SNR by name", entry)
        _checked(entry["step"], "int", f"{where}.step")
        for name, value in entry["gsnr"].items():
            _checked(name, "str", f"{where}.gsnr")
            _checked(value, "float", f"{where}.gsnr[{reprlib.repr(name)}]")


def thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every second entry, and the last, where there are more numbers than a report should hold."""
    while len(history) > 2 and sum(len(entry["gsnr"]) for entry in history) > HISTORY_VALUES:
        history = history[::-2][::-1]
    return history


_DAMAGED = "the file is damaged"


def _wrong(where: str, rule: str, value: Any) -> ReportError:
    return ReportError(f"{where} of a g-SNR report must be {rule} but is {reprlib.repr(value)}; {_DAMAGED}")


def _check_row(where: str, row: Any) -> None:
    if row.numel != math.prod(row.shape):
        raise _wrong(f"{where}.numel", f"the product of the shape {reprlib.repr(row.shape)}", row.numel)
    status = getattr(row, "status", None)
    if status is None:  # a route
        return
    if status not in STATUSES:
        raise _wrong(f"{where}.status", f"one of {', '.join(STATUSES)}", status)
    for name in ("gsnr", "gsnr_over_sqrt_numel", "scale"):
        if status != "pending" and getattr(row, name) < SMALLEST:
            raise _wrong(f"{where}.{name}", f"above 0 where the status is {status}", getattr(row, name))


def _whole(digits: str) -> float:
    return int(digits) if len(digits) < 19 else math.inf


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in fields if names.count(name) > 1)
        raise ReportError(f"{twin:.80} of a g-SNR report must stand once but stands twice in an object; {_DAMAGED}")
    return fields


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 <= value <= LARGEST


def _is_text(value: Any) -> bool:
    """Whether it is a string that a file or a terminal can hold: JSON may give half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


# By a field's annotation: what a value must be, and whether it is. What has no entry is rows, checked by [`rows`].
_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("text", _is_text),
    "int": ("a whole number from 0", _is_whole),
    "int | None": ("a whole number from 0", lambda value: value is None or _is_whole(value)),
    "float": (f"a number from 0 to {LARGEST:g}", _is_number),
    "tuple[int, ...]": (
        f"a list of at most {MAX_DIMENSIONS} whole numbers from 0",
        lambda value: isinstance(value, list) and len(value) <= MAX_DIMENSIONS and all(map(_is_whole, value)),
    ),
    "list[float]": ("a list of numbers", lambda value: isinstance(value, list)),
    "dict[str, Any]": ("a dict", lambda value: isinstance(value, dict)),
    "dict[str, str]": ("a dict", lambda value: isinstance(value, dict)),
}


def _checked(value: Any, annotation: str, where: str) -> Any:
    """The value for a field, by the annotation's text."""
    rule, holds = _CHECKS.get(annotation, ("", lambda value: True))
    if not holds(value):
        raise _wrong(where, rule, value)
    if annotation == "list[float]":
        return [_checked(each, "float", f"{where}[{index}]") for index, each in enumerate(value)]
    if annotation in ("dict[str, Any]", "dict[str, str]"):
        for name, each in value.items():
            _check_plain(each, annotation == "dict[str, str]", f"{where}.{name:.80}", 1)
    return tuple(value) if annotation == "tuple[int, ...]" else value


def _check_plain(value: Any, only_text: bool, where: str, depth: int) -> None:
    """Text, or any plain value whose numbers are finite."""
    if only_text or isinstance(value, str):
        if not _is_text(value):
            raise _wrong(where, "text", value)
    elif isinstance(value, list | dict):
        if depth > MAX_DEPTH:
            raise ReportError(f"{where:.80} of a g-SNR report must be nested at most {MAX_DEPTH} deep but is deeper")
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_plain(each, False, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise _wrong(where, "a finite number", value)
