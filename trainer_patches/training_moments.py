"""
When a training of the host's Trainer begins and ends, in every Trainer: those of others, and without a callback.

The host's own callbacks see the beginning, but not an end by an exception; and a Trainer has only those it was given.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import wrapt


OnBegin = Callable[[Any, Any, Any], None]
OnEnd = Callable[[Any], None]

_MODULE = "transformers.trainer"

_watching: list[tuple[OnBegin, OnEnd]] = []
_hooked = False


def watch_trainings(on_begin: OnBegin, on_end: OnEnd) -> None:
    """
    From now on these are called; a second call replaces the functions of the first.

    The host is not imported for it: where it is imported later, its trainings are watched then.

    Args:
        on_begin (callable): Called with the arguments, the model and the optimizer of a Trainer, before its callbacks
            hear that the training begins: all is prepared, and no step was made. What it raises ends the training.
        on_end (callable): Called with the Trainer when its `train()` ends, by an exception too.
    """
    global _hooked
    _watching[:] = [(on_begin, on_end)]
    if _MODULE in sys.modules:
        _apply(sys.modules[_MODULE])
    elif not _hooked:
        wrapt.register_post_import_hook(_apply, _MODULE)
        _hooked = True


def unwatch_trainings() -> None:
    """Undoes [`watch_trainings`]."""
    _watching.clear()
    if _MODULE in sys.modules:
        for cls, name in _places(sys.modules[_MODULE]):
            method = getattr(cls, name)
            if hasattr(method, "_watches"):
                setattr(cls, name, method.__wrapped__)


@contextlib.contextmanager
def replaced_trainings(instead: Callable[[Any], None]) -> Iterator[None]:
    """
    While it is open, the first `train()` of a Trainer calls this function with the Trainer, and does not train; what
    the function itself has trained, is trained. The host is not imported for it.

    Args:
        instead (callable): Called once.
    """
    undo: list[Callable[[], None]] = []
    begun: list[bool] = []

    def replace(module: ModuleType) -> None:
        original = module.Trainer.train

        @functools.wraps(original)
        def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if begun:
                return original(trainer, *args, **kwargs)
            begun.append(True)
            return instead(trainer)

        module.Trainer.train = train
        undo.append(lambda: setattr(module.Trainer, "train", original))

    if _MODULE in sys.modules:
        replace(sys.modules[_MODULE])
    else:
        wrapt.register_post_import_hook(replace, _MODULE)
    try:
        yield
    finally:
        for each in undo:
            each()


def _places(module: ModuleType) -> list[tuple[type, str]]:
    """`on_train_begin` of the handler gets what the training uses, whatever made it; both since transformers 4."""
    return [(module.CallbackHandler, "on_train_begin"), (module.Trainer, "train")]


def _apply(module: ModuleType) -> None:
    for (cls, name), make in zip(_places(module), (_with_beginning, _with_end), strict=True):
        if _watching and not hasattr(getattr(cls, name), "_watches"):
            setattr(cls, name, make(getattr(cls, name)))


def _with_beginning(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def on_train_begin(handler: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        for on_begin, _ in _watching:
            on_begin(args, handler.model, handler.optimizer)
        return original(handler, args, *rest, **kwargs)

    on_train_begin._watches = True  # type: ignore[attr-defined]
    return on_train_begin


def _with_end(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(trainer, *args, **kwargs)
        finally:
            for _, on_end in _watching:
                on_end(trainer)

    train._watches = True  # type: ignore[attr-defined]
    return train
