"""Our optimizers as choices of the hosts: table handlers, the route without patches, groups with names, a check."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

import trainer_patches
from trainer_patches.compat import decay_parameter_names

from .optim.registry import OptimizerRecord, OptionError, get_record, list_records, parse_options, record_of
from .report import GSNRReport


logger = logging.getLogger(__name__)

_decay_rule: ContextVar[Callable[[nn.Module], Iterable[str]]] = ContextVar("decay_rule", default=decay_parameter_names)


class OptimizerMismatchError(ValueError, TypeError):
    """The optimizer that runs is not the one that was asked for."""


def register() -> None:
    """
    Makes the names of [`list_records`] valid for `TrainingArguments(optim=...)`; done by `import hf_sai`.

    Idempotent. transformers is not imported by it; the names appear when it is.

    Raises:
        `trainer_patches.UnsupportedHostError`: The installed transformers is not one that this works with.
    """
    for record in list_records():
        trainer_patches.add_optimizer(record.name, _handlers[record.name])


def unregister() -> None:
    """Undoes [`register`]: the host's enum, table and parser are as they were."""
    for record in list_records():
        trainer_patches.remove_optimizer(record.name)


def optimizer_cls_and_kwargs(
    name: str, *, lr: float, weight_decay: float | None = None, **options: Any
) -> tuple[type[Optimizer], dict[str, Any]]:
    """
    The route without patches: what the argument `optimizer_cls_and_kwargs` of `Trainer` and `SFTTrainer` takes.

    The host then sets weight decay per group (no biases, no norms) from `TrainingArguments.weight_decay`.

    Args:
        name (`str`): Such as `"sgd_sai"`.
        lr (`float`): Learning rate. The host does not fill it in on this route, so it has no default.
        weight_decay (`float`, *optional*): Used only for groups that have none of their own.
        options: As for `optim_args`, typed or as text.

    Raises:
        `OptionError`: The name, an option or a value is not known.

    Example:

    ```python
    choice = optimizer_cls_and_kwargs("sgd_sai", lr=0.1, normalize="none")
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=choice)
    ```
    """
    record = get_record(name)
    kwargs = {"lr": lr, **_constructor_options(record, options)}
    if weight_decay is not None:
        kwargs["weight_decay"] = weight_decay
    return record.cls, kwargs


def create_optimizer(
    name: str,
    model_or_params: nn.Module | Iterable[Any],
    lr: float | None = None,
    weight_decay: float | None = None,
    **options: Any,
) -> Optimizer:
    """
    An optimizer for a hand-written loop.

    Args:
        name (`str`): Such as `"sgd_sai"`.
        model_or_params (`torch.nn.Module` or iterable): A model gives named groups, without decay for biases and
            norms; parameters, pairs or groups are taken as they are, with their own `lr` and `weight_decay`.
        lr (`float`, *optional*): Defaults to the optimizer's own.
        weight_decay (`float`, *optional*): Defaults to the optimizer's own.
        options: As for `optim_args`.

    Raises:
        `OptionError`: The name, an option or a value is not known.
    """
    record = get_record(name)
    kwargs = _constructor_options(record, options)
    kwargs["lr"] = record.default("lr") if lr is None else lr
    kwargs["weight_decay"] = record.default("weight_decay") if weight_decay is None else weight_decay
    params: Any = model_or_params
    if isinstance(model_or_params, nn.Module):
        params = param_groups(model_or_params, name, weight_decay=kwargs["weight_decay"])
    return record.cls(params, **kwargs)


def param_groups(
    model: nn.Module, optim: str, weight_decay: float = 0.0, decay_names: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """
    Named parameter groups of a model: with weight decay, and (biases and norms) without.

    Args:
        model (`torch.nn.Module`): Its trainable parameters are taken, each once.
        optim (`str`): Such as `"sgd_sai"`.
        weight_decay (`float`, *optional*, defaults to 0.0): Of the first group.
        decay_names (iterable of `str`, *optional*): Names that decay. Defaults to the host Trainer's rule.

    Returns:
        `list[dict]`: Groups whose `"params"` are `("name", tensor)` pairs. An empty one is left out.
    """
    get_record(optim)
    if decay_names is None:
        decay_names = decay_parameter_names(model)
    decays = set(decay_names)
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups = [
        {"params": [pair for pair in trainable if pair[0] in decays], "weight_decay": weight_decay},
        {"params": [pair for pair in trainable if pair[0] not in decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@contextlib.contextmanager
def decay_rule(rule: Callable[[nn.Module], Iterable[str]]) -> Iterator[None]:
    """While it is open, handlers ask `rule(model)` which parameters decay: a Trainer subclass may have its own."""
    token = _decay_rule.set(rule)
    try:
        yield
    finally:
        _decay_rule.reset(token)


def name_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """
    Gives every group the names of its parameters (`param_names`, as torch keeps them), where it has none.

    Args:
        optimizer (`torch.optim.Optimizer`): Without a wrapper.
        model (`torch.nn.Module`): Where the names come from. A parameter that is not in it is called `unnamed`.
    """
    names = {param: name for name, param in model.named_parameters()}
    for group in optimizer.param_groups:
        group.setdefault("param_names", [names.get(param, "unnamed") for param in group["params"]])


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper (and any other that keeps it as `.optimizer`)."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def assert_optimizer(optimizer: Any, name: str) -> None:
    """
    Checks that what runs is what was asked for; looks through accelerate's wrapper.

    Args:
        optimizer (`torch.optim.Optimizer`): The live one.
        name (`str`): Such as `"sgd_sai"`.

    Raises:
        `OptimizerMismatchError`: It is another one.
    """
    record = get_record(name)
    live = unwrap_optimizer(optimizer)
    if record_of(live) is not record:
        raise OptimizerMismatchError(
            f"optim={name!r} asks for {record.cls.__name__}, but the optimizer that runs is {type(live).__name__}; "
            "something replaced it: an `optimizers=` argument, a create_optimizer of your own, or a launcher's config"
        )


def _handle(record: OptimizerRecord, context: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    """Handler for the host's table: `OptimizerContext` in, class and keyword arguments out."""
    _refuse_unsupported_modes(record, context.args)
    kwargs: dict[str, Any] = {
        "lr": context.args.learning_rate,
        "weight_decay": context.args.weight_decay,
        **_constructor_options(record, context.optim_args),
    }
    shown = ", ".join(f"{key}={value}" for key, value in kwargs.items() if key != "gsnr")
    logger.info("optim=%s: %s", record.name, shown)
    if context.model is not None:
        names = _decay_rule.get()(context.model)
        kwargs["params"] = param_groups(context.model, record.name, context.args.weight_decay, decay_names=names)
    return record.cls, kwargs


def _constructor_options(record: OptimizerRecord, given: Mapping[str, Any]) -> dict[str, Any]:
    """Typed options, with the rows of the report that `gsnr` names in its place."""
    options = parse_options(record, given)
    source = options.pop("gsnr", None)
    if isinstance(source, (str, os.PathLike)):
        options["gsnr"] = GSNRReport.from_pretrained(source).tensors
    elif source is not None:
        options["gsnr"] = getattr(source, "tensors", source)
    return options


def _refuse_unsupported_modes(record: OptimizerRecord, args: Any) -> None:
    """What would give another result than asked for is an error before the first step."""
    for field in ("deepspeed", "fsdp"):
        by_launcher = os.environ.get(f"ACCELERATE_USE_{field.upper()}", "false").lower() in ("1", "true", "yes")
        if getattr(args, field, None) or getattr(args, f"{field}_plugin", None) or by_launcher:
            raise OptionError(
                f"optim={record.name!r} measures whole tensors, but {field} is set and splits them over the ranks; "
                f"unset {field} (DDP works), or choose another optimizer"
            )
    if not record.layerwise:
        return
    ordinary = record.name.removesuffix("_layerwise")
    for field, needed in (
        ("max_grad_norm", 0),  # there is nothing left to clip when all gradients are known
        ("gradient_accumulation_steps", 1),
        ("fp16", False),
        ("world_size", 1),
    ):
        value = getattr(args, field)
        if value != needed and value is not None:
            raise OptionError(
                f"optim={record.name!r} updates inside the backward pass and needs {field}={needed}, but it is "
                f"{value}; set it so, or use optim={ordinary!r}"
            )


_handlers = {record.name: functools.partial(_handle, record) for record in list_records()}
