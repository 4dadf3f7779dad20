"""
Our names among the host's choices, without importing what they stand for: an `import hf_sai` costs no torch.

Names come from [`hf_sai.optimizer_facts`], so that our own are there at once; one that a program adds by
[`hf_sai.optim.register_record`] is heard of through the registry, from when it is imported.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import wrapt

import trainer_patches

from .optimizer_facts import optimizer_table


if TYPE_CHECKING:
    from .optim.registry import OptimizerRecord

_REGISTRY = "hf_sai.optim.registry"
_registered = False


def register() -> None:
    """
    Makes the names of [`hf_sai.optim.list_records`] valid for `TrainingArguments(optim=...)`; done by `import hf_sai`.

    Every Trainer then checks, before the first step, that our optimizer runs where it was asked for, and that it was
    made for the model that is trained. It warns of a learning rate that is Adam's, and writes the report and its
    section of the card, as [`SaITrainer`] does; with `HF_SAI_REPORT=0` in the environment it does not.

    Idempotent. Neither transformers nor torch is imported by it; the names appear when transformers is.

    Raises:
        `trainer_patches.UnsupportedHostError`: The installed transformers is not one that this works with.
    """
    global _registered
    for row in optimizer_table():
        trainer_patches.add_optimizer(row["name"], functools.partial(_handle, row["name"]))
    trainer_patches.check_deepspeed(__name__, _check_deepspeed)
    trainer_patches.watch_trainings(_start_training, _begin_training, _end_training)
    if not _registered:
        _registered = True
        wrapt.register_post_import_hook(_watch, _REGISTRY)


def unregister() -> None:
    """Undoes [`register`]: the host's enum, table, parser and trainings are as they were."""
    global _registered
    _registered = False
    trainer_patches.unwatch_trainings()
    trainer_patches.remove_deepspeed_check(__name__)
    if _REGISTRY in sys.modules:
        sys.modules[_REGISTRY].watch_records(_on_record, watching=False)
    for row in optimizer_table():
        trainer_patches.remove_optimizer(row["name"])


def _watch(registry: Any) -> None:
    """Called when the registry is imported; the hook stays when [`unregister`] has been called."""
    if _registered:
        registry.watch_records(_on_record)


def _on_record(record: OptimizerRecord, there: bool) -> None:
    """Adds a record to the host's choices, or takes it out of them."""
    if there:
        trainer_patches.add_optimizer(record.name, functools.partial(_handle, record.name))
    else:
        trainer_patches.remove_optimizer(record.name)


def _handle(name: str, context: Any) -> tuple[Any, dict[str, Any]]:
    """Handler for the host's table: `OptimizerContext` in, class and keyword arguments out."""
    from .integration import handle

    return handle(name, context)


def _check_deepspeed(args: Any, config: dict[str, Any]) -> None:
    from .integration import check_deepspeed

    check_deepspeed(args, config)


def _start_training(trainer: Any, resume_from_checkpoint: Any) -> None:
    from .live import trains_ours

    if trains_ours(trainer):
        from .trainer import look_after

        look_after(trainer, resume_from_checkpoint)


def _begin_training(args: Any, model: Any, optimizer: Any) -> None:
    from .live import begin_training

    begin_training(args, model, optimizer)


def _end_training(trainer: Any) -> None:
    from .live import end_training

    end_training(getattr(trainer, "optimizer", None))
