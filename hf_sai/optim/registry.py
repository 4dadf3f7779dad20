"""The optimizers by name: one frozen record each, and typed parsing of their options."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.optimizer import Optimizer

from .gsnr import NORMALIZATIONS
from .layerwise import SGDSaILayerwise, SWANLayerwise
from .lora_pairs import PAIR_POLICIES, adapter_pairs
from .routing import LORA_POLICIES, route_parameters
from .sgd_sai import STATE_DTYPES, SGDSaI
from .swan import SWAN, WHITENING_DTYPES
from .whitening import METHODS


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
        routing (`bool`): Whether it is an argument of [`hf_sai.param_groups`] and not of the constructor.
    """

    name: str
    kind: str
    parse: Callable[[Any], Any]
    help: str
    routing: bool = False


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
        layerwise (`bool`): Whether it updates inside the backward pass.
        routed (`bool`): Whether it needs [`route_parameters`]; learning rates are then in AdamW's terms, and the
            host's settings for Adam (`adam_beta1`, ...) hold for the tensors that go to Adam.
        rows (`str`): What a report shows of each tensor: `"scales"` (from `gsnr_statistics()`), `"routes"` (from
            `routes()`), or `"groups"`, which needs neither: the tensor's group with its options.
    """

    name: str
    cls: type[Optimizer]
    description: str
    options: tuple[Option, ...]
    paper: str
    learning_rate_hint: str
    layerwise: bool = False
    routed: bool = False
    rows: str = "groups"

    def default(self, name: str) -> Any:
        """The default of an option, or of another argument of the constructor."""
        routing = any(option.name == name and option.routing for option in self.options)
        grouping = route_parameters if self.routed else adapter_pairs
        return inspect.signature(grouping if routing else self.cls).parameters[name].default


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


def _is_none(value: Any) -> bool:
    return value is None or str(value).lower() == "none"


def _to_bool_or_none(value: Any) -> bool | None:
    return None if _is_none(value) else _to_bool(value)


def _to_state_dtype(value: Any) -> str | None:
    if _is_none(value):
        return None
    name = str(value).removeprefix("torch.")
    if name not in STATE_DTYPES:
        raise ValueError
    return name


def _to_int_or_none(value: Any) -> int | None:
    return None if _is_none(value) else _to_int(value)


def _to_pair(value: Any) -> tuple[float, float]:
    """`"0.9/0.95"` or a sequence: a comma separates options."""
    first, second = re.split(r"[/,\s]+", value.strip("()[] ")) if isinstance(value, str) else value
    return _to_float(first), _to_float(second)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if str(value) not in choices:
            raise ValueError
        return str(value)

    return parse


def _to_source(value: Any) -> Any:
    if value == "" or isinstance(value, (bool, int, float)):
        raise ValueError
    return None if _is_none(value) else value


def _to_normalization(value: Any) -> str:
    if value is None:  # a host that reads Python literals hands on "none" as None
        return "none"
    if value not in NORMALIZATIONS:
        raise ValueError
    return str(value)


_SGD_SAI = OptimizerRecord(
    name="sgd_sai",
    cls=SGDSaI,
    description="SGD-SaI: momentum SGD, learning-rate scale per tensor measured once; half of AdamW's state",
    options=(
        Option("momentum", "a number", _to_float, "decay of the momentum buffer, in [0, 1); 0 keeps none"),
        Option("eps", "a number", _to_float, "added to the gradient's standard deviation"),
        Option("normalize", "none or max", _to_normalization, "divide g-SNR by its maximum over the model"),
        Option("measure_steps", "a whole number", _to_int, "average g-SNR over this many first gradients"),
        Option("maximize", "true or false", _to_bool, "ascend instead of descend"),
        Option("foreach", "true, false or none", _to_bool_or_none, "update lists of tensors at once"),
        Option("fused", "true, false or none", _to_bool_or_none, "one pass over memory; none chooses"),
        Option("state_dtype", "float32, bfloat16, float16 or none", _to_state_dtype, "of the momentum buffer"),
        Option("stochastic_rounding", "true or false", _to_bool, "of bf16 parameters"),
        Option("gsnr", "a report: file, folder or Hub repository", _to_source, "take scales, measure nothing"),
        Option("lora_policy", " or ".join(PAIR_POLICIES), _one_of(*PAIR_POLICIES), "LoRA factors as pairs", True),
    ),
    paper="2412.11768",
    learning_rate_hint=(
        "start at 1e-2 for full training and 1e-1 for LoRA with normalize=none (5e-3 with lora_policy=paired); "
        "with normalize=max, multiply by the largest g-SNR in the report"
    ),
    rows="scales",
)

_SWAN = OptimizerRecord(
    name="swan",
    cls=SWAN,
    description="SWAN: whitened gradients without state for the matrices in the blocks, Adam for the rest",
    options=(
        Option("whitening", " or ".join(METHODS), _one_of(*METHODS), "how matrices are whitened"),
        Option("ns_steps", "a whole number or none", _to_int_or_none, "of the iteration; none takes the method's own"),
        Option("whitening_dtype", " or ".join(WHITENING_DTYPES), _one_of(*WHITENING_DTYPES), "of polar_express"),
        Option("scale", "a number", _to_float, "of the learning rate, for matrices"),
        Option("adam_lr_ratio", "a number", _to_float, "of the learning rate, for what goes to Adam"),
        Option("betas", "two numbers, such as 0.9/0.999", _to_pair, "Adam's"),
        Option("eps", "a number", _to_float, "Adam's"),
        Option("momentum", "a number", _to_float, "whiten a running mean, in [0, 1); 0 keeps none"),
        Option("maximize", "true or false", _to_bool, "ascend instead of descend"),
        Option("stochastic_rounding", "true or false", _to_bool, "of bf16 parameters"),
        Option("max_batch_bytes", "a whole number or none", _to_int_or_none, "bound on whitening's extra memory"),
        Option("lora_policy", " or ".join(LORA_POLICIES), _one_of(*LORA_POLICIES), "LoRA factors to whiten", True),
        Option("split_qkv", "true or false", _to_bool, "whiten fused query, key and value one by one", True),
    ),
    paper="2412.13148",
    learning_rate_hint="start at the rate that is right for AdamW; for LoRA at a third of it",
    routed=True,
    rows="routes",
)

_RECORDS: dict[str, OptimizerRecord] = {
    record.name: record
    for record in [
        _SGD_SAI,
        dataclasses.replace(
            _SGD_SAI,
            name="sgd_sai_layerwise",
            cls=SGDSaILayerwise,
            description="SGD-SaI that updates, and frees each gradient, inside the backward pass; one process",
            layerwise=True,
        ),
        _SWAN,
        dataclasses.replace(
            _SWAN,
            name="swan_layerwise",
            cls=SWANLayerwise,
            description="SWAN that updates, and frees each gradient, inside the backward pass; one process",
            layerwise=True,
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


def record_of(optimizer: Optimizer) -> OptimizerRecord | None:
    """The record of a live optimizer's class, or of the nearest class that it derives from; `None` if not ours."""
    for cls in type(optimizer).__mro__:
        for record in _RECORDS.values():
            if record.cls is cls:
                return record
    return None


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


def split_routing(record: OptimizerRecord, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Typed options in two: the constructor's, and those that decide about groups ([`route_parameters`])."""
    names = {option.name for option in record.options if option.routing}
    routing = {name: value for name, value in options.items() if name in names}
    if routing.get("lora_policy") == "plain":  # asks for nothing, and so needs no model
        del routing["lora_policy"]
    return {name: value for name, value in options.items() if name not in names}, routing
