"""
A check before `transformers` builds DeepSpeed's optimizer, whose configuration may name one that takes the place of
the one that was asked for.

The host's modules are not imported for it: it waits until they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from .compat import seam


Check = Callable[[Any, dict[str, Any]], None]

_MODULE, _FUNCTION = "transformers.integrations.deepspeed", "deepspeed_optim_sched"

_checks: dict[str, Check] = {}
_hooked = False


def check_deepspeed(name: str, check: Check) -> None:
    """
    Has `check(args, config)` called before a Trainer under DeepSpeed makes its optimizer; it may raise.

    Args:
        name (`str`): Of the check; another one of that name is replaced.
        check (callable): Takes the `TrainingArguments` and DeepSpeed's configuration, a dict.
    """
    global _hooked
    _checks[name] = check
    if not _hooked:
        _hooked = True
        if _MODULE in sys.modules:
            _wrap(sys.modules[_MODULE])
        else:
            wrapt.register_post_import_hook(_wrap, _MODULE)


def remove_deepspeed_check(name: str) -> None:
    """Undoes [`check_deepspeed`]."""
    _checks.pop(name, None)


def _wrap(module: ModuleType) -> None:
    original = seam(module, _FUNCTION, "an optimizer that DeepSpeed's configuration names is found later only")
    if original is None or isinstance(original, _Checked):
        return
    setattr(module, _FUNCTION, _Checked(original))


class _Checked:
    """`deepspeed_optim_sched(trainer, hf_deepspeed_config, args, ...)` after the checks."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.replaces = original

    def __call__(self, trainer: Any, hf_deepspeed_config: Any, args: Any, *rest: Any, **named: Any) -> Any:
        for check in list(_checks.values()):
            check(args, hf_deepspeed_config.config)
        return self.replaces(trainer, hf_deepspeed_config, args, *rest, **named)
