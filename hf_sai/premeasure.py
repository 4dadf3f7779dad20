"""Scales from batches before the first update: what the Trainer trains, measured, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .optim.measure import left_as_it_was, mean_gsnr, trainable_parameters
from .optim.registry import OptionError


def premeasure(optimizer: Any, trainer: Any, loader: Iterable[Any], count: int) -> None:
    """
    Gives the optimizer scales from batches before its first step.

    The Trainer makes the gradients itself, by its `training_step`: its own loss, its own batches, as many for one
    measurement as for one update. Weights, gradients, buffers, modes, random generators and the Trainer's own numbers
    are then as before, and the training begins with the same batches.

    Args:
        optimizer (`SGDSaI`): Without a wrapper, before its first step.
        trainer (`transformers.Trainer`): When its training begins.
        loader (iterable): The training data, which the training reads next. It is read once.
        count (`int`): How many updates' gradients to measure.

    Raises:
        `OptionError`: There are several processes, no trainer, data that can't be handed on, or the optimizer measures
            nothing.
    """
    _refuse(optimizer, trainer)
    updates = _read(trainer, loader, count)
    model = trainer.model
    named = trainable_parameters(model)

    def gradients() -> Iterator[list[Tensor | None]]:
        for batches, items in updates:
            model.zero_grad(set_to_none=True)
            trainer.current_gradient_accumulation_steps = len(batches)
            for batch in batches:
                trainer.training_step(trainer.model_wrapped, spare(batch), items)
            yield [param.grad for _, param in named]

    with left_as_it_was(model), trainer_left_as_it_was(trainer), _without_updates(optimizer):
        rows = mean_gsnr(named, gradients())
    optimizer.take_scales(rows)


def _refuse(optimizer: Any, trainer: Any) -> None:
    if not hasattr(optimizer, "take_scales"):
        raise OptionError(
            f"gsnr_premeasure_batches needs an optimizer that measures g-SNR, but {type(optimizer).__name__} runs; "
            "set it to 0"
        )
    if optimizer.is_partitioned:
        raise OptionError(
            "gsnr_premeasure_batches runs the model by itself, but DeepSpeed holds it; set "
            "optim_args='measure_steps=...' instead"
        )
    if trainer is None:
        raise OptionError(
            "gsnr_premeasure_batches measures the trainer's own loss, but the callback was made without the trainer; "
            "add it by trainer.add_callback(GSNRCallback(trainer, config))"
        )
    if trainer.args.world_size > 1:
        raise OptionError(
            f"gsnr_premeasure_batches works in one process, but there are {trainer.args.world_size}; set "
            "optim_args='measure_steps=...' instead, which averages over all of them"
        )


def _read(trainer: Any, loader: Iterable[Any], count: int) -> list[tuple[list[Any], Any]]:
    """The batches of the first updates, with what the Trainer counts in them; the loader gives them out once more."""
    iterator = iter(loader)
    updates = first_updates(trainer, iterator, count)
    _put_back(loader, [batch for batches, _ in updates for batch in batches], iterator)
    return updates


def first_updates(trainer: Any, iterator: Iterator[Any], count: int) -> list[tuple[list[Any], Any]]:
    """The next updates of an iterator over a Trainer's batches: the batches of each, and what the Trainer counts."""
    args = trainer.args
    updates = [
        trainer.get_batch_samples(iterator, args.gradient_accumulation_steps, args.device) for _ in range(count)
    ]
    return [(batches, items) for batches, items in updates if batches]


def _put_back(loader: Any, read: list[Any], iterator: Iterator[Any]) -> None:
    """
    Has the next `iter(loader)` give what was read, and then what is left; a stream can't be read twice.

    Raises:
        `OptionError`: That can't be done, and the loader can be read only once.
    """
    cls = type(loader)
    become = object.__dict__["__class__"].__set__  # accelerate's loaders show the class of another object

    def once_more(self: Any) -> Iterator[Any]:
        become(self, cls)
        return _chained(read, iterator)

    try:
        become(loader, type(cls.__name__, (cls,), {"__iter__": once_more, "__module__": cls.__module__}))
    except TypeError:  # a list, a generator
        if iter(loader) is loader:
            raise OptionError(
                f"gsnr_premeasure_batches reads batches that the training needs too, but the {cls.__name__} that "
                "get_train_dataloader gives can be read only once; give a DataLoader, or set it to 0"
            ) from None


def _chained(read: list[Any], iterator: Iterator[Any]) -> Iterator[Any]:
    while read:
        yield read.pop(0)
    yield from iterator


def spare(batch: Any) -> Any:
    """A batch that a Trainer may take the labels out of."""
    return copy.copy(batch) if isinstance(batch, (Mapping, list)) else batch


@contextlib.contextmanager
def _without_updates(optimizer: Any) -> Iterator[None]:
    """Layer-wise updates are switched off while it is open."""
    layerwise = hasattr(optimizer, "detach")
    if layerwise:
        optimizer.detach()
    try:
        yield
    finally:
        if layerwise:
            optimizer.attach()


@contextlib.contextmanager
def trainer_left_as_it_was(trainer: Any) -> Iterator[None]:
    """What a Trainer keeps of its steps (TRL's count tokens and collect metrics) is as before."""
    fields, cls = vars(trainer), type(trainer)
    before = dict(fields)
    kept = {
        name: copy.deepcopy(value)
        for name, value in fields.items()
        if name.startswith("_") and isinstance(value, (dict, list, deque)) and _is_plain(value)
    }
    try:
        yield
    finally:
        trainer.__class__ = cls  # one that we look after has another in its first training
        for name in [name for name in fields if name not in before]:
            del fields[name]
        for name, value in before.items():
            if value is None or isinstance(value, (bool, int, float, str)):
                fields[name] = value
        for name, value in kept.items():
            _refill(before[name], value)
            fields[name] = before[name]


def _is_plain(value: Any) -> bool:
    """Numbers, texts and containers of them only: nothing large, nothing that others hold."""
    if isinstance(value, Mapping):
        return all(_is_plain(each) for each in value.values())
    if isinstance(value, (list, tuple, deque)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _refill(container: Any, value: Any) -> None:
    container.clear()
    (container.update if isinstance(container, dict) else container.extend)(value)
