"""Values of metrics as a card can hold them: plain numbers and texts, whatever computed them."""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult


logger = logging.getLogger(__name__)

# What trainers, scripts and metrics put beside a measure: times and speeds, counts, memory, progress.
_NO_MEASURE = re.compile(
    r"(?:^|_)(?:runtime|(?:per|a)_second|time|flos|samples|steps?|tokens(?:_seen)?|examples|epochs?|counts?|totals?)$"
    r"|^(?:translation|reference)_length$|^(?:sys|ref)_len$|^(?:num|n|total|number_of)_|(?:^|_)mem_(?:cpu|gpu)(?:_|$)"
    r"|^(?:number|support|hits|grad_norm|learning_rate)$"
)


def as_number(value: Any, finite: bool = True) -> float | int | None:
    """
    A number of Python, of NumPy or of torch (an array or a tensor of one element too) as one of Python.

    `None` for what is none: texts, lists, truth values, arrays of more or fewer elements, and where `finite` is set
    NaN and infinities.
    """
    if not isinstance(value, (numbers.Real, str, bytes)) and callable(getattr(value, "item", None)):
        if getattr(value, "size", None) != 1 and not (hasattr(value, "numel") and value.numel() == 1):
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    value = int(value) if isinstance(value, numbers.Integral) else float(value)
    return value if math.isfinite(value) or not finite else None


def measures(metrics: Mapping[str, Any], prefix: str) -> dict[str, float | int]:
    """
    What an evaluation measured, without `prefix`, times and counts; a value that is no number is named in a warning.
    """
    named = {str(name).removeprefix(prefix): value for name, value in metrics.items()}
    named = {name: value for name, value in named.items() if not _NO_MEASURE.search(name)}
    found = {name: as_number(value) for name, value in named.items()}
    odd = [name for name, value in found.items() if value is None]
    if odd:
        logger.warning("Metrics that are no finite numbers are left out of the card: %s.", ", ".join(odd))
    return {name: value for name, value in found.items() if value is not None}


def plain(value: Any) -> Any:
    """
    A value with all that it holds as YAML knows it; a number of NumPy or torch is one of Python, another thing a text.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    number = as_number(value)
    return number if number is not None else str(value)


def plain_results(results: Iterable[EvalResult]) -> list[EvalResult]:
    """Results with plain values; one whose measure is neither a number nor a text is left out, with a warning."""
    kept = []
    for each in results:
        fields = {field.name: plain(getattr(each, field.name)) for field in dataclasses.fields(each)}
        value = each.metric_value
        number = as_number(value)
        if number is None and not isinstance(value, str):
            logger.warning(
                "The result %s is left out of the card: a measure must be a finite number or a text, but it is a %s.",
                each.metric_type,
                type(value).__name__,
            )
            continue
        kept.append(EvalResult(**{**fields, "metric_value": value if number is None else number}))
    return kept
