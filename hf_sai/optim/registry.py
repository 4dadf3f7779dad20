"""The optimizers by name: one frozen record each, and typed parsing of their options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.optimizer import Optimizer

from .sgd_sai import NORMALIZATIONS, SGDSaI


class OptionError(ValueError):
    """An optimizer, an option or a value that is not known; the message lists those that are."""


@dataclass(frozen=True)
class Option:
    """
    One option of an optimizer, as it is typed in `optim_args`.

    Args:
        name (`str`): The constructor's argument.
        kind (`str`): What a value must be, as the error says it: `"a number"`, `"a whole number"`, `"true or false"`.
        parse (callable): Text or value to value; raises `ValueError` where it can't.
        help (`str`): One line for the command line.
    """

    name: str
    kind: str
    parse: Callable[[Any], Any]
    help: str


@dataclass(frozen=True)
class OptimizerRecord:
    """
    All that a host needs to know of an optimizer.

    Args:
        name (`str`): Lower case; what a user types after `optim=`.
        cls (`type`): The `torch.optim.Optimizer` subclass.
        description (`str`): One line.
        options (`tuple[Option, ...]`): Options besides `lr` and `weight_decay`, which hosts have fields for.
        paper (`str`): arXiv id.
        learning_rate_hint (`str`): What to set the learning rate to, in one sentence.
    """

    name: str
    cls: type[Optimizer]
    description: str
    options: tuple[Option, ...]
    paper: str
    learning_rate_hint: str

    def default(self, name: str) -> Any:
        """The constructor's default of an argument."""
        return inspect.signature(self.cls.__init__).parameters[name].default


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]


def _to_normalization(value: Any) -> str:
    if value is None:  # a host that reads Python literals hands on "none" as None
        return "none"
    if value not in NORMALIZATIONS:
        raise ValueError
    return str(value)


_RECORDS: dict[str, OptimizerRecord] = {
    record.name: record
    for record in [
        OptimizerRecord(
            name="sgd_sai",
            cls=SGDSaI,
            description="SGD-SaI: momentum SGD, learning-rate scale per tensor measured once; half of AdamW's state",
            options=(
                Option("momentum", "a number", _to_float, "decay of the momentum buffer, in [0, 1); 0 keeps none"),
                Option("eps", "a number", _to_float, "added to the gradient's standard deviation"),
                Option("normalize", "none or max", _to_normalization, "divide g-SNR by its maximum over the model"),
                Option("measure_steps", "a whole number", _to_int, "average g-SNR over this many first gradients"),
                Option("maximize", "true or false", _to_bool, "ascend instead of descend"),
            ),
            paper="2412.11768",
            learning_rate_hint=(
                "start at 1e-2 for full training and 1e-1 for LoRA with normalize=none; "
                "with normalize=max, multiply by the largest g-SNR in the report"
            ),
        ),
    ]
}


def list_records() -> list[OptimizerRecord]:
    """All optimizers, by name."""
    return [_RECORDS[name] for name in sorted(_RECORDS)]


def get_record(name: str) -> OptimizerRecord:
    """
    The record of an optimizer.

    Args:
        name (`str`): Such as `"sgd_sai"`.

    Raises:
        `OptionError`: No optimizer has that name.
    """
    if name not in _RECORDS:
        raise OptionError(f"{name!r} is not an optimizer of hf_sai; choose one of: {', '.join(sorted(_RECORDS))}")
    return _RECORDS[name]


def parse_options(record: OptimizerRecord, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Options as typed values.

    Args:
        record (`OptimizerRecord`): The optimizer.
        given (mapping of `str` to text or value): As from `optim_args="momentum=0.9,normalize=max"`.

    Returns:
        `dict`: What was given, typed. Ranges are the constructor's to check.

    Raises:
        `OptionError`: An option is not known or its value can't be read.
    """
    known = {option.name: option for option in record.options}
    parsed = {}
    for name, value in given.items():
        if name in ("lr", "learning_rate", "weight_decay"):
            field = "weight_decay" if name == "weight_decay" else "learning_rate"
            raise OptionError(f"{name} is not set through the options of {record.name}; set {field} itself")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise OptionError(
                f"{name} is not an option of {record.name}; {hint}valid options: {', '.join(sorted(known))}"
            )
        option = known[name]
        try:
            parsed[name] = option.parse(value)
        except (ValueError, KeyError, TypeError):
            raise OptionError(
                f"{name} of {record.name} must be {option.kind} but is {value!r}; "
                f"write for example {name}={record.default(name)}"
            ) from None
    return parsed
