"""Options in one place: what a value has to be (by the optimizers), and text to value (by the registry)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any


# ---- ranges: each raises `ValueError` with the rule, the value and the remedy ----


def check_number(name: str, value: Any, remedy: str, positive: bool = False) -> None:
    """Finite, and 0 or above; above 0 where it has to be `positive`."""
    if not (0.0 < value < math.inf if positive else 0.0 <= value < math.inf):
        raise ValueError(f"{name} must be finite and {'>' if positive else '>='} 0 but is {value}; {remedy}")


def check_share(name: str, value: Any, remedy: str) -> None:
    """In [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1) but is {value}; {remedy}")


def check_whole(name: str, value: Any, remedy: str, optional: bool = False) -> None:
    """A whole number from 1 on; `None` too where it is `optional`."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        either = " or None" if optional else ""
        raise ValueError(f"{name} must be a whole number >= 1{either} but is {value!r}; {remedy}")


def check_flag(name: str, value: Any, optional: bool = False) -> None:
    """True or false; `None` too where it is `optional`."""
    if isinstance(value, bool) or (optional and value is None):
        return
    if optional:
        raise ValueError(f"{name} must be True, False or None but is {value!r}; None chooses by itself")
    raise ValueError(f"{name} must be True or False but is {value!r}; give one of the two")


def check_choice(
    name: str, value: Any, choices: Collection[str], remedy: str = "choose one", optional: bool = False
) -> None:
    """One of some words; `None` too where it is `optional`."""
    if value not in choices and not (optional and value is None):
        either = " or None" if optional else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}{either} but is {value!r}; {remedy}")


# ---- text or value to value: each raises `ValueError`, `KeyError` or `TypeError` where it can't ----


def to_float(value: Any) -> float:
    """A number; `True` is none."""
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def to_int(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def to_bool(value: Any) -> bool:
    """`True` from `"true"`, `"1"` and `"yes"`, `False` from their opposites."""
    if isinstance(value, bool):
        return value
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]


def to_pair(value: Any) -> tuple[float, float]:
    """`"0.9/0.95"` or a sequence: a comma separates options."""
    first, second = re.split(r"[/,\s]+", value.strip("()[] ")) if isinstance(value, str) else value
    return to_float(first), to_float(second)


def to_source(value: Any) -> Any:
    """A report, or where one is; `None` for `"none"`."""
    if value == "" or isinstance(value, (bool, int, float)):
        raise ValueError
    return None if _is_none(value) else value


def one_of(*choices: str) -> Callable[[Any], str]:
    """One of some words, or what torch prints for one (`torch.bfloat16`)."""

    def parse(value: Any) -> str:
        # A host that reads Python literals hands on "none" as None.
        word = "none" if value is None else str(value).removeprefix("torch.")
        if word not in choices:
            raise ValueError
        return word

    return parse


def or_none(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """As `parse`, and `None` for `None` and `"none"`."""
    return lambda value: None if _is_none(value) else parse(value)


def _is_none(value: Any) -> bool:
    return value is None or str(value).lower() == "none"
