"""
When a training of the host's Trainer starts, begins its steps and ends, in every Trainer: those of others, and without
a callback.

The host's own callbacks see the first step coming, but not an end by an exception; and a Trainer has only those it was
given.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import wrapt

from .compat import seam


OnStart = Callable[[Any, Any], None]
OnBegin = Callable[[Any, Any, Any], None]
OnEnd = Callable[[Any], None]

_MODULE = "transformers.trainer"

_watching: list[tuple[OnStart, OnBegin, OnEnd]] = []
_hooked = False


def watch_trainings(on_start: OnStart, on_begin: OnBegin, on_end: OnEnd) -> None:
    """
    From now on these are called; a second call replaces the functions of the first.

    The host is not imported for it: where it is imported later, its trainings are watched then.

    Args:
        on_start (callable): Called with the Trainer, and with what it is to resume from or `None`, when its `train()`
            is called: there is no optimizer yet, unless it was given one.
        on_begin (callable): Called with the arguments, the model and the optimizer of a Trainer, before its callbacks
            hear that the training begins: all is prepared, and no step was made. What it raises ends the training.
        on_end (callable): Called with the Trainer when its `train()` ends, by an exception too.
    """
    global _hooked
    _watching[:] = [(on_start, on_begin, on_end)]
    if _MODULE in sys.modules:
        _apply(sys.modules[_MODULE])
    elif not _hooked:
        wrapt.register_post_import_hook(_apply, _MODULE)
        _hooked = True


def unwatch_trainings() -> None:
    """Undoes [`watch_trainings`]."""
    _watching.clear()
    if _MODULE in sys.modules:
        for cls, name, method in _places(sys.modules[_MODULE]):
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


def trainings_are_watched() -> bool:
    """Whether [`watch_trainings`] reaches every training of the host."""
    module = sys.modules.get(_MODULE)
    return bool(_watching) and module is not None and all(hasattr(each[2], "_watches") for each in _places(module))


def _places(module: ModuleType) -> Iterator[tuple[type, str, Any]]:
    """
    Classes of the host, with the method that is wrapped: `on_train_begin` of the handler gets what the training uses,
    whatever made it. Both since transformers 4. Remove when the host calls functions around every training.
    """
    lost = "no training is checked before its first step"
    for holder, name in (("CallbackHandler", "on_train_begin"), ("Trainer", "train")):
        cls = seam(module, holder, lost)
        method = None if cls is None else seam(cls, name, lost)
        if method is not None:
            yield cls, name, method


def _apply(module: ModuleType) -> None:
    wrappers = {"on_train_begin": _with_beginning, "train": _with_start_and_end}
    for cls, name, method in _places(module):
        if _watching and not hasattr(method, "_watches"):
            wrapped: Any = wrappers[name](method)
            wrapped._watches = True
            setattr(cls, name, wrapped)


def _with_beginning(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def on_train_begin(handler: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        for _, on_begin, _ in _watching:
            on_begin(args, handler.model, handler.optimizer)
        return original(handler, args, *rest, **kwargs)

    return on_train_begin


def _with_start_and_end(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:
            for on_start, _, _ in _watching:
                on_start(trainer, resume_from_checkpoint)
            return original(trainer, resume_from_checkpoint, *args, **kwargs)
        finally:
            for _, _, on_end in _watching:
                on_end(trainer)

    return train
