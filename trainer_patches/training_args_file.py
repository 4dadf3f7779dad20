"""
A `training_args.bin` that holds no token.

The host pickles its `TrainingArguments` with every checkpoint and uploads the file; `hub_token` stands in it in clear.
"""

from __future__ import annotations

import copyreg
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


# Fields that hold a token whatever it looks like. Not all that ends in "_token": TRL has eos_token and pad_token.
SECRET_FIELDS = frozenset({"hub_token", "push_to_hub_token", "token", "hf_token", "use_auth_token"})
_LOOKS_LIKE_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


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
    secrets = {value for name, value in vars(args).items() if name in SECRET_FIELDS and isinstance(value, str)}
    rebuild, arguments, state, *rest = args.__reduce_ex__(2)
    return rebuild, arguments, _scrub(state, secrets), *rest


def _scrub(value: Any, secrets: set[str]) -> Any:
    """`value` with `None` for every token, in nested dicts, lists and tuples as well; copies what it changes."""
    if isinstance(value, dict) and type(value) is dict:
        return {
            key: None if key in SECRET_FIELDS and isinstance(item, str) else _scrub(item, secrets)
            for key, item in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(_scrub(item, secrets) for item in value)
    if type(value) is str and (value in secrets or _LOOKS_LIKE_TOKEN.search(value)):
        return None
    return value
