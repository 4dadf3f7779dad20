"""The options of SWAN: what they may be, and how they are read from text."""

from __future__ import annotations

from typing import Any

from .checks import (
    check_betas,
    check_choice,
    check_flag,
    check_number,
    check_share,
    check_whole,
    one_of,
    or_none,
    to_bool,
    to_float,
    to_int,
    to_pair,
)
from .matrices import WHITENING_DTYPES
from .routing import LORA_POLICIES
from .whitening import METHODS, check_whitening


# Of its groups: they tell its state from those of others.
SAVED_KEYS = frozenset({"kind", "routes"})
KINDS = ("auto", "swan", "adam")

FROM_TEXT = {
    **dict.fromkeys(("lr", "scale", "adam_lr_ratio", "eps", "weight_decay", "momentum"), to_float),
    **dict.fromkeys(("ns_steps", "max_batch_bytes"), or_none(to_int)),
    "ns_beta": or_none(to_float),
    **dict.fromkeys(("maximize", "stochastic_rounding", "split_qkv", "share_whitening"), to_bool),
    "betas": to_pair,
    "whitening": one_of(*METHODS),
    "whitening_dtype": one_of(*WHITENING_DTYPES),
    "lora_whitening": or_none(one_of(*LORA_POLICIES)),
}


def check_options(options: dict[str, Any]) -> None:
    """Raises `ValueError` for the first option that is out of its range."""
    for name in ("lr", "weight_decay", "eps"):
        check_number(name, options[name], "give a number such as 0.001")
    for name in ("scale", "adam_lr_ratio"):
        check_number(name, options[name], "the default is 3.0", positive=True)
    check_whitening(options["whitening"], options["ns_steps"], options["ns_beta"])
    check_choice("whitening_dtype", options["whitening_dtype"], WHITENING_DTYPES, "float32 keeps all digits")
    check_betas(options["betas"])
    check_share("momentum", options["momentum"], "the paper has none, 0.0")
    for name in ("maximize", "stochastic_rounding"):
        check_flag(name, options[name])
    check_whole("max_batch_bytes", options["max_batch_bytes"], "None chooses by itself", optional=True)
    check_choice("lora_whitening", options["lora_whitening"], LORA_POLICIES, optional=True)
    check_flag("split_qkv", options["split_qkv"])
    check_choice("kind", options["kind"], KINDS, "'auto' goes by the dimensions")
