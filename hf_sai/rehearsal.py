"""Updates of a Trainer's own training that are undone: for tests of a learning rate before the training itself."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .live import begin_training, end_training, splitting_mode, unwrap_optimizer
from .optim.measure import left_as_it_was
from .optim.registry import OptionError
from .premeasure import first_updates, spare, trainer_left_as_it_was


T = TypeVar("T")


class _Ended(BaseException):
    """Takes a rehearsal out of `train()`; no `Exception`, which a host might take for a fault of the training."""


class Rehearsal:
    """
    A Trainer at the beginning of its training: everything is prepared, and no step was made.

    [`Rehearsal.run`] makes the first updates as the training would: its batches, its `training_step`, its clipping and
    its optimizer. Each run begins with the same weights, state, batches and random numbers, so that two runs differ in
    their learning rates alone.

    Args:
        trainer (`transformers.Trainer`): Within its `train()`.
        count (`int`): How many updates' batches are read; a short data set has less.
    """

    def __init__(self, trainer: Any, count: int) -> None:
        self._trainer = trainer
        self._optimizer = unwrap_optimizer(trainer.optimizer)
        self._updates = first_updates(trainer, iter(trainer.callback_handler.train_dataloader), count)
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        # On the CPU, where there is room for a second model.
        self._weights = [(param, param.detach().to("cpu", copy=True)) for param in params]
        self._state = copy.deepcopy(self._optimizer.state_dict())
        self._scaler = copy.deepcopy(self._scaler_state())
        # A scheduler has set `lr` to what its first step has, which is 0 in a warm-up.
        self._peaks = [float(group.get("initial_lr", group["lr"])) for group in self._optimizer.param_groups]

    def __len__(self) -> int:
        """The number of updates that there are batches for."""
        return len(self._updates)

    def run(self, rates: Sequence[float], is_over: Callable[[list[float]], bool]) -> list[float]:
        """
        Makes updates, and undoes them.

        Args:
            rates (`list[float]`): The learning rate of each update; a group that has one of its own keeps its share
                of `args.learning_rate`.
            is_over (callable): From the losses so far, whether more would tell nothing.

        Returns:
            `list[float]`: The loss of each update's batches, before that update.
        """
        losses: list[float] = []
        try:
            with left_as_it_was(self._trainer.model), trainer_left_as_it_was(self._trainer):
                self._zero_grad()
                for (batches, items), rate in zip(self._updates, rates, strict=False):
                    self._set_rate(rate)
                    losses.append(self._loss_with_gradients(batches, items))
                    if is_over(losses):
                        break
                    self._step()
        finally:
            self._zero_grad()
            self._undo()
        return losses

    def _set_rate(self, rate: float) -> None:
        base = self._trainer.args.learning_rate
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = rate * (peak / base if base else 1.0)

    def _loss_with_gradients(self, batches: list[Any], items: Any) -> float:
        trainer = self._trainer
        trainer.current_gradient_accumulation_steps = len(batches)
        losses = [trainer.training_step(trainer.model_wrapped, spare(batch), items) for batch in batches]
        return float(sum(losses))

    def _step(self) -> None:
        trainer, clip = self._trainer, self._trainer.args.max_grad_norm
        if clip:
            trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), clip)
        trainer.optimizer.step()
        self._zero_grad()

    def _zero_grad(self) -> None:
        self._trainer.model_wrapped.zero_grad()
        self._optimizer.zero_grad()

    def _undo(self) -> None:
        with torch.no_grad():
            for param, weight in self._weights:
                param.copy_(weight)
        self._optimizer.load_state_dict(copy.deepcopy(self._state))
        if self._scaler:
            self._trainer.accelerator.scaler.load_state_dict(self._scaler)

    def _scaler_state(self) -> dict[str, Any]:
        """Of fp16's loss; empty without."""
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        return scaler.state_dict() if scaler is not None else {}


def rehearse(trainer: Any, count: int, play: Callable[[Rehearsal], T]) -> T:
    """
    Has a Trainer begin its training, calls a function there, and leaves everything as it was.

    Weights, buffers, gradients, modes and hooks of the model, the optimizer, the random generators (Python's, NumPy's,
    torch's on every device) and the Trainer's own fields are then as before; a training that follows reads the same
    batches. No callback hears of it, and nothing is written.

    Args:
        trainer (`transformers.Trainer`): Before its training.
        count (`int`): How many updates' batches are read.
        play (callable): Called with the [`Rehearsal`].

    Returns:
        What `play` returns.

    Raises:
        `OptionError`: There are several processes, or DeepSpeed or FSDP holds the model.
    """
    _refuse(trainer)
    handler = trainer.callback_handler
    found: list[T] = []

    def instead(args: Any, state: Any, control: Any, *rest: Any, **kwargs: Any) -> Any:
        begin_training(args, handler.model, handler.optimizer)
        found.append(play(Rehearsal(trainer, count)))
        raise _Ended

    with _left_as_it_was(trainer):
        handler.on_train_begin = instead
        try:
            trainer.train()
        except _Ended:
            pass
        finally:
            end_training(trainer.optimizer)
            trainer.accelerator.free_memory()
    return found[0]


def _refuse(trainer: Any) -> None:
    args = trainer.args
    if args.world_size > 1:
        raise OptionError(
            f"a test of learning rates runs in one process, but there are {args.world_size}; start it without a "
            "launcher, with gradient_accumulation_steps multiplied by the number of processes"
        )
    mode = splitting_mode(args) or ("fsdp" if getattr(args, "fsdp", None) else None)
    if mode is not None:
        raise OptionError(
            f"a test of learning rates needs whole tensors, but {mode} holds the model; test without it, on a model "
            "that fits, or with LoRA"
        )


@contextlib.contextmanager
def _left_as_it_was(trainer: Any) -> Iterator[None]:
    """Everything that `train()` changes before its first step, and all that a rehearsal changes then."""
    given = unwrap_optimizer(trainer.optimizer)  # None where the Trainer makes it
    state = copy.deepcopy(given.state_dict()) if given is not None else None
    objects = [vars(each) for each in (trainer, trainer.callback_handler)]
    with left_as_it_was(trainer.model), trainer_left_as_it_was(trainer), _same_modules(trainer.model):
        before = [dict(fields) for fields in objects]
        try:
            yield
        finally:
            for fields, values in zip(objects, before, strict=True):
                fields.clear()
                fields.update(values)
            if given is not None:
                given.load_state_dict(state)


@contextlib.contextmanager
def _same_modules(model: nn.Module) -> Iterator[None]:
    """The fields of all modules (a `forward` that accelerate wraps, gradient checkpointing) and their hooks."""
    kept = [(vars(module), dict(vars(module))) for module in model.modules()]
    tables = [(value, dict(value)) for _, before in kept for value in before.values() if isinstance(value, dict)]
    try:
        yield
    finally:
        for fields, before in [*kept, *tables]:
            fields.clear()
            fields.update(before)
