"""Options in one place: what a value has to be (by the optimizers), and text to value (by the registry)."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import numbers
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any


# ---- ranges: each raises `ValueError` with the rule, the value and the remedy ----


def check_number(name: str, value: Any, remedy: str, positive: bool = False) -> None:
    """Finite, and 0 or above; above 0 where it has to be `positive`. A tensor counts by its one element."""
    number = _number(name, value, remedy)
    if not (0.0 < number < math.inf if positive else 0.0 <= number < math.inf):
        raise ValueError(f"{name} must be finite and {'>' if positive else '>='} 0 but is {value}; {remedy}")


def check_share(name: str, value: Any, remedy: str) -> None:
    """In [0, 1). A tensor counts by its one element."""
    if not 0.0 <= _number(name, value, remedy) < 1.0:
        raise ValueError(f"{name} must be in [0, 1) but is {value}; {remedy}")


def check_betas(value: Any) -> None:
    """Two numbers in [0, 1)."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1) but is {value!r}; the default is (0.9, 0.999)")
    for index, beta in enumerate(value):
        if not 0.0 <= _number(f"betas[{index}]", beta, "the default is (0.9, 0.999)") < 1.0:
            raise ValueError(f"betas must be two numbers in [0, 1) but is {value!r}; the default is (0.9, 0.999)")


def _number(name: str, value: Any, remedy: str) -> Any:
    """
    What a number option compares by.

    Raises:
        `ValueError`: It is a tensor of several elements (in the words of torch's own optimizers), or no number.
    """
    if hasattr(value, "numel"):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element but has the shape {tuple(value.shape)}; {remedy}")
        return value.detach().item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number but is {value!r}; {remedy}")
    return value


def refuse_unknown(cls: type, options: Mapping[str, Any]) -> None:
    """Raises [`UnknownOptionError`] where a constructor was given options that it has not."""
    parameters = inspect.signature(cls).parameters.values()
    valid = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD and each.name != "params"]
    for name in options:
        chosen = getattr(cls, "_chosen", ())
        if chosen and name in (*chosen, "lora_policy"):
            raise UnknownOptionError(
                f"{name} of {cls.__name__} is a choice of groups, for which the model is needed, but {cls.__name__} "
                f"was given tensors; build it with hf_sai.create_optimizer(..., model, {name}=...), or leave it out"
            )
        close = difflib.get_close_matches(name, valid, n=1)
        hint = f"did you mean {close[0]}? " if close else "leave it out; "
        raise UnknownOptionError(
            f"{cls.__name__} has no option {name}; {hint}valid options: {', '.join(sorted(valid))}"
        )


class UnknownOptionError(ValueError, TypeError):
    """A constructor has no argument of that name. A `TypeError` as well, which Python raises for it."""


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


def from_text(options: Mapping[str, Any], parsers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """
    Options with plain values in place of text, as hosts hand them on that take a class by its path (`"0.9"`,
    `"none"`), of numpy's numbers, which a checkpoint could not be read with, and of tensors of one element. A learning
    rate stays a tensor: schedulers write into it.

    Args:
        options (mapping): With or without each name of `parsers`; what can't be read stays, for a check to refuse.
        parsers (mapping of `str` to callable): From what a host gives to value, by name.
    """
    found = dict(options)
    for name in parsers.keys() & found.keys():
        value = found[name]
        tensors = [each for each in (value if isinstance(value, (tuple, list)) else [value]) if hasattr(each, "numel")]
        if not tensors or (name != "lr" and all(each.numel() == 1 for each in tensors)):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found[name] = parsers[name](value)
    return found


def one_of(*choices: str) -> Callable[[Any], str]:
    """One of some words, or what torch prints for one (`torch.bfloat16`)."""

    def parse(value: Any) -> str:
        # A host that reads Python literals hands on "none" as None.
        word = "none" if value is None else str(value).strip("'\"").removeprefix("torch.").lower()
        if word not in choices:
            raise ValueError
        return word

    return parse


def none_is(meant: str, parse: Callable[[Any], str]) -> Callable[[Any], str]:
    """As `parse`, and what is meant for `None` and `"none"`."""
    return lambda value: meant if _is_none(value) else parse(value)


def or_none(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """As `parse`, and `None` for `None` and `"none"`."""
    return lambda value: None if _is_none(value) else parse(value)


def _is_none(value: Any) -> bool:
    return value is None or str(value).strip("'\"").lower() == "none"
