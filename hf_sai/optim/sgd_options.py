"""The options of SGD-SaI: what they may be, and how they are read from text."""

from __future__ import annotations

import os
from typing import Any

import torch

from .checks import (
    check_choice,
    check_flag,
    check_number,
    check_share,
    check_whole,
    none_is,
    one_of,
    or_none,
    to_bool,
    to_float,
    to_int,
    to_source,
)
from .gsnr import NORMALIZATIONS
from .lora_pairs import PAIR_POLICIES


# Of its groups: they tell its state from those of others.
SAVED_KEYS = frozenset({"normalize", "gsnr_max"})
# No float16: the buffer has the gradient's unit, of which float16 loses what is below 1e-7 or above 65504.
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_name(dtype: Any) -> Any:
    """`torch.bfloat16` as `"bfloat16"`: a group holds plain values."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


FROM_TEXT = {
    **dict.fromkeys(("lr", "momentum", "weight_decay", "eps"), to_float),
    **dict.fromkeys(("foreach", "fused"), or_none(to_bool)),
    **dict.fromkeys(("maximize", "stochastic_rounding", "kahan_sum"), to_bool),
    "normalize": one_of(*NORMALIZATIONS),
    "measure_steps": to_int,
    "state_dtype": or_none(one_of(*STATE_DTYPES)),
    "lora_policy": none_is("plain", one_of(*PAIR_POLICIES)),
}


def rows_in(given: Any) -> list[Any] | None:
    """
    The rows that the option `gsnr` holds; `None` where it is not given, or `"none"`.

    Raises:
        `ValueError`: It says where a report is, which only those read that have a model.
    """
    if isinstance(given, (str, os.PathLike)):
        given = to_source(given)
        if given is not None:
            raise ValueError(
                f"gsnr of SGDSaI must be the rows of a report but is {os.fspath(given)!r}; "
                "hf_sai.GSNRReport.from_pretrained(...).tensors reads them"
            )
    return None if given is None else list(given)


def check_options(options: dict[str, Any]) -> None:
    """Raises `ValueError` for the first option that is out of its range."""
    for name in ("lr", "weight_decay", "eps"):
        check_number(name, options[name], "give a number such as 0.01")
    check_share("momentum", options["momentum"], "the paper uses 0.9")
    learning_rate = "choose one (the learning rate depends on it)"
    check_choice("normalize", options["normalize"], NORMALIZATIONS, learning_rate)
    check_choice("lora_policy", options["lora_policy"], PAIR_POLICIES)
    check_whole("measure_steps", options["measure_steps"], "the paper uses 1")
    for name in ("maximize", "stochastic_rounding", "kahan_sum"):
        check_flag(name, options[name])
    if options["stochastic_rounding"] and options["kahan_sum"]:
        raise ValueError(
            "stochastic_rounding and kahan_sum must not both be True, but they are; kahan_sum is the more exact one, "
            "stochastic_rounding the one without state"
        )
    for name in ("foreach", "fused"):
        check_flag(name, options[name], optional=True)
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused must not both be True, but they are; set one, or none to let it choose")
    kept = "None keeps the parameter's"
    if options["state_dtype"] == "float16":
        kept = "float16 loses gradients below 1e-7 and above 65504, bfloat16 takes as little memory"
    check_choice("state_dtype", options["state_dtype"], STATE_DTYPES, kept, optional=True)
