"""
A `training_args.bin` that holds no token.

The host pickles its `TrainingArguments` with every checkpoint and uploads the file; `hub_token` stands in it in clear.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .tokens import MASK, TOKEN


# Fields that hold a token whatever it looks like. Not all that ends in "_token": TRL has eos_token and pad_token.
SECRET_FIELDS = frozenset({"hub_token", "push_to_hub_token", "token", "hf_token", "use_auth_token"})


@contextmanager
def token_free_pickles(args: Any) -> Iterator[None]:
    """
    While it is open, pickling an object of `type(args)` writes `None` for every token in it; `args` is not changed.

    Works through `copyreg`, which `pickle`, and so `torch.save`, asks first. Not for other threads: they would
    pickle without tokens as well.

    Args:
        args (`TrainingArguments`): Any object with a `__dict__`.
    """
    cls = type(args)
    before = copyreg.dispatch_table.get(cls)
    copyreg.pickle(cls, _reduce_without_tokens)
    try:
        yield
    finally:
        if before is None:
            copyreg.dispatch_table.pop(cls, None)
        else:
            copyreg.dispatch_table[cls] = before


def _reduce_without_tokens(args: Any) -> tuple[Any, ...]:
    secrets = {
        value for name, value in vars(args).items() if name in SECRET_FIELDS and isinstance(value, str) and value
    }
    rebuild, arguments, state, *rest = args.__reduce_ex__(2)
    return rebuild, arguments, _scrub(state, secrets), *rest


def _scrub(value: Any, secrets: set[str]) -> Any:
    """`value` without tokens, in nested mappings and sequences as well; copies what it changes."""
    if isinstance(value, Mapping):
        cleaned = {
            key: None if key in SECRET_FIELDS and isinstance(item, str) else _scrub(item, secrets)
            for key, item in value.items()
        }
        return cleaned if cleaned != dict(value) or type(value) is dict else value
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_scrub(item, secrets) for item in value)
    if type(value) is str:
        for secret in secrets:
            value = value.replace(secret, MASK)
        return TOKEN.sub(MASK, value)
    return value
