"""
Adds names to `TrainingArguments(optim=...)`: a member of the host's enum and an entry in its table of handlers.

The host's modules are not imported for it (that takes seconds): what is added waits until they are.
"""

from __future__ import annotations

import contextlib
import copyreg
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any

import wrapt

from .compat import (
    OPTIM_ARGS_PARSER,
    UnsupportedHostError,
    check_transformers_version,
    optimizer_handlers,
    optimizer_names,
)


Handler = Callable[[Any], tuple[Any, dict[str, Any]]]

_ARGUMENTS_MODULE = "transformers.training_args"
_OPTIMIZER_MODULE = "transformers.trainer_optimizer"
_TRAINER_MODULE = "transformers.trainer"

_added: dict[str, Handler] = {}
_hooked = False


def add_optimizer(name: str, handler: Handler) -> None:
    """
    Makes `TrainingArguments(optim=name)` and `--optim name` valid. Adding the same pair again changes nothing.

    Where the host is imported later and turns out to have the name itself, or no table, that is a warning then: an
    import of the host never fails by this.

    Args:
        name (`str`): Lower case, as a user types it.
        handler (callable): Takes the host's `OptimizerContext`, returns `(optimizer class, keyword arguments)`.

    Raises:
        `UnsupportedHostError`: The installed transformers is not one that this was made for.
        `ValueError`: The host, or somebody else's handler, has that name already.
    """
    check_transformers_version()
    if name in _added and _origin(_added[name]) != _origin(handler):
        raise ValueError(f"the optimizer name {name!r} is taken by {_origin(_added[name])}; remove that one first")
    previous = _added.get(name)
    _added[name] = handler
    try:
        _hook_imports()
        for module in (_ARGUMENTS_MODULE, _OPTIMIZER_MODULE, _TRAINER_MODULE):
            if module in sys.modules:
                _apply(sys.modules[module], name, previous)
    except ValueError:
        if previous is None:
            remove_optimizer(name)
        raise


def _origin(handler: Any) -> str:
    """Where a handler was defined: the same one after its module was imported anew."""
    function = getattr(handler, "func", handler)
    return f"{function.__module__}.{function.__qualname__}"


def remove_optimizer(name: str) -> None:
    """Undoes [`add_optimizer`]; a name that was not added is left alone."""
    handler = _added.pop(name, None)
    if handler is None:
        return
    if _ARGUMENTS_MODULE in sys.modules:
        with contextlib.suppress(UnsupportedHostError):  # no names, nothing to take out of them
            _remove_member(optimizer_names(sys.modules[_ARGUMENTS_MODULE]), name)
    if _OPTIMIZER_MODULE in sys.modules:
        with contextlib.suppress(UnsupportedHostError):  # no table, nothing to take out of it
            table = optimizer_handlers(sys.modules[_OPTIMIZER_MODULE])
            if table.get(name) is handler:
                del table[name]
    if not _added:
        _restore_host()


def added_optimizers() -> dict[str, Handler]:
    """What has been added, by name."""
    return dict(_added)


def _hook_imports() -> None:
    """Applies what is added as soon as the host's modules are imported, now or later; wrapt has no way to unhook."""
    global _hooked
    if not _hooked:
        _hooked = True
        for module in (_ARGUMENTS_MODULE, _OPTIMIZER_MODULE, _TRAINER_MODULE):
            if module not in sys.modules:
                wrapt.register_post_import_hook(_apply_all, module)


def _apply_all(module: ModuleType) -> None:
    """The host has just imported one of its modules: its import must not fail by what is added to it."""
    for name in list(_added):
        try:
            _apply(module, name, None)
        except ValueError as error:
            remove_optimizer(name)
            warnings.warn(f"{name!r} was not added: {error}", stacklevel=2)


def _apply(module: ModuleType, name: str, previous: Handler | None) -> None:
    """Adds to one of the host's modules what belongs there of one name."""
    if module.__name__ == _ARGUMENTS_MODULE:
        enum = optimizer_names(module)
        _add_member(enum, name)
        copyreg.pickle(enum, _reduce_member)
        return
    original = getattr(module, OPTIM_ARGS_PARSER, None)
    if original is not None and not isinstance(original, _Parser):
        setattr(module, OPTIM_ARGS_PARSER, _Parser(original))
    if module.__name__ == _OPTIMIZER_MODULE:
        table = optimizer_handlers(module)
        if table.get(name) not in (None, previous, _added[name]):
            raise ValueError(
                f"the optimizer name {name!r} is taken by {_origin(table[name])} in the host's table; "
                "remove that one first, or choose another name"
            )
        table[name] = _added[name]


def _restore_host() -> None:
    """Takes back what all names share: the parser of `optim_args` and how the enum is pickled."""
    for module_name in (_OPTIMIZER_MODULE, _TRAINER_MODULE):
        module = sys.modules.get(module_name)
        parser = getattr(module, OPTIM_ARGS_PARSER, None)
        if isinstance(parser, _Parser):
            setattr(module, OPTIM_ARGS_PARSER, parser.replaces)
    with contextlib.suppress(KeyError, UnsupportedHostError):
        del copyreg.dispatch_table[optimizer_names(sys.modules[_ARGUMENTS_MODULE])]


def _add_member(enum: Any, name: str) -> None:
    """Adds a member to an enum of strings; the standard library has no way to do that before Python 3.13."""
    key = name.upper()
    if name in enum._value2member_map_:
        if not getattr(enum._value2member_map_[name], "_added_by_patch", False):
            raise ValueError(
                f"the optimizer name {name!r} is one of the host's own; use the host's, or choose another name"
            )
        return
    member: Any = str.__new__(enum, name)
    member._name_, member._value_, member.__objclass__ = key, name, enum
    member._sort_order_ = len(enum._member_names_)
    member._added_by_patch = True
    enum._member_names_.append(key)
    enum._member_map_[key] = member
    enum._value2member_map_[name] = member
    if hasattr(enum, "_hashable_values_"):  # Python >= 3.12: what `value in enum` looks in
        enum._hashable_values_.append(name)
    type.__setattr__(enum, key, member)


def _remove_member(enum: Any, name: str) -> None:
    key = name.upper()
    if not getattr(enum._value2member_map_.get(name), "_added_by_patch", False):
        return
    del enum._value2member_map_[name], enum._member_map_[key]
    enum._member_names_.remove(key)
    if hasattr(enum, "_hashable_values_"):
        enum._hashable_values_.remove(name)
    type.__delattr__(enum, key)


def _reduce_member(member: Enum) -> tuple[Any, ...]:
    """
    How a member is pickled: an added one as its plain string, so that a `training_args.bin` that holds it loads in a
    process that never heard of the name. (The host compares and looks up by string, so it makes no difference there.)
    """
    if getattr(member, "_added_by_patch", False):
        return str, (member.value,)
    return type(member), (member.value,)


class _Parser:
    """The host's parser of `optim_args`; where that one fails, the error says what could not be read."""

    def __init__(self, original: Callable[[str | None], dict[str, Any]]) -> None:
        self.replaces = original

    def __call__(self, text: str | None) -> dict[str, Any]:
        try:
            return self.replaces(text)
        except ValueError:
            parse_optim_args(text)
            raise


def parse_optim_args(text: str | None) -> dict[str, str]:
    """
    `"a=1,b=x"` as a dict, every value a string. As the host reads it, but that spaces inside a value (a path) stay.

    Raises:
        `ValueError`: An entry is not one `name=value`, or a name stands twice.
    """
    parsed: dict[str, str] = {}
    for entry in text.split(",") if text else []:
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not name or not value or "=" in value:
            raise ValueError(
                f"optim_args must be name=value entries with commas between, but {entry!r} in {text!r} is not one; "
                'write for example optim_args="momentum=0.9,eps=1e-8" (values with a comma can\'t be given)'
            )
        if name in parsed:
            raise ValueError(f"optim_args must name an option once, but {name!r} stands twice in {text!r}; remove one")
        parsed[name] = value
    return parsed
