"""Our optimizers as choices of the hosts: table handlers, the route without patches, groups with names, a check."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from trainer_patches.compat import decay_parameter_names, settings_of_own_groups, target_module_matches
from trainer_patches.optim_names import parse_optim_args

from .deepspeed_config import check_config, deepspeed_config, is_left_out
from .live import splitting_mode, under_ddp
from .optim.decay import decaying
from .optim.names import plain_name, unwrapped
from .optim.registry import (
    OptimizerRecord,
    OptionError,
    get_record,
    list_records,
    parse_options,
    split_routing,
)
from .report import GSNRReport


logger = logging.getLogger(__name__)


def decaying_names(model: nn.Module) -> set[str]:
    """
    Names of the parameters that decay: all but biases and norms, as the host's Trainer has it, but by module; see
    [`hf_sai.optim.decay.decaying`].

    Args:
        model (`torch.nn.Module`): Of any library.
    """
    return decaying(model, decay_parameter_names(unwrapped(model)))


_decay_rule: ContextVar[Callable[[nn.Module], Iterable[str]]] = ContextVar("decay_rule", default=decaying_names)


def optimizer_cls_and_kwargs(
    name: str,
    *,
    lr: float,
    weight_decay: float | None = None,
    model: nn.Module | None = None,
    target_modules: str | list[str] | None = None,
    **options: Any,
) -> tuple[type[Optimizer], dict[str, Any]]:
    """
    The route without patches: what the argument `optimizer_cls_and_kwargs` of `Trainer` and `SFTTrainer` takes.

    The host then sets weight decay per group (no biases, no norms) from `TrainingArguments.weight_decay`, but where
    `model` is given: the groups are then made here, with `weight_decay`.

    Args:
        name (`str`): Such as `"sgd_sai"`.
        lr (`float`): Learning rate. The host does not fill it in on this route, so it has no default.
        weight_decay (`float`, *optional*): Used only for groups that have none of their own.
        model (`torch.nn.Module`, *optional*): The model that is trained, with its adapter. SWAN needs it, to tell
            embeddings and heads from other matrices.
        target_modules (`str` or `list[str]`, *optional*): As in [`param_groups`].
        options: As for `optim_args`, typed or as text.

    Raises:
        `OptionError`: The name, an option or a value is not known, or SWAN was asked for without a model.

    Example:

    ```python
    choice = optimizer_cls_and_kwargs("sgd_sai", lr=1e-3, normalize="none")
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=choice)
    ```
    """
    record = get_record(name)
    constructor, routing = _typed_options(record, options)
    kwargs = {"lr": lr, **constructor}
    if weight_decay is not None:
        kwargs["weight_decay"] = weight_decay
    if model is not None:
        kwargs["params"] = param_groups(model, name, weight_decay or 0.0, target_modules=target_modules, **routing)
    elif record.needs_modules or routing:
        asked_for = "" if record.needs_modules else f" with {', '.join(routing)}"
        raise OptionError(
            f"{name}{asked_for} is routed by the model's modules, but this route was "
            "given no model; pass model=, the one that the trainer trains (with its adapter), or set optim= in the "
            "arguments instead"
        )
    return record.cls, kwargs


def create_optimizer(
    name: str,
    model_or_params: nn.Module | Iterable[Any],
    lr: float | None = None,
    weight_decay: float | None = None,
    target_modules: str | list[str] | None = None,
    **options: Any,
) -> Optimizer:
    """
    An optimizer for a hand-written loop.

    Args:
        name (`str`): Such as `"sgd_sai"`.
        model_or_params (`torch.nn.Module` or iterable): A model gives named groups, without decay for biases and
            norms; parameters, pairs or groups are taken as they are, with their own `lr` and `weight_decay`. SWAN then
            knows no modules, and takes what has two dimensions or more for a matrix, embeddings too.
        lr (`float`, *optional*): Defaults to the optimizer's own.
        weight_decay (`float`, *optional*): Defaults to the optimizer's own.
        target_modules (`str` or `list[str]`, *optional*): As in [`param_groups`].
        options: As for `optim_args`.

    Raises:
        `OptionError`: The name, an option or a value is not known, or routing was asked for without a model.
    """
    record = get_record(name)
    kwargs, routing = _typed_options(record, options)
    kwargs["lr"] = record.default("lr") if lr is None else lr
    kwargs["weight_decay"] = record.default("weight_decay") if weight_decay is None else weight_decay
    if target_modules is not None:
        routing["target_modules"] = target_modules
    params: Any = model_or_params
    if isinstance(model_or_params, nn.Module):
        params = param_groups(model_or_params, name, weight_decay=kwargs["weight_decay"], **routing)
    elif routing:
        raise OptionError(
            f"{', '.join(routing)} of {name} need the modules, but only parameters were given; pass the model"
        )
    return record.cls(params, **kwargs)


def param_groups(
    model: nn.Module,
    optim: str,
    weight_decay: float = 0.0,
    decay_names: Iterable[str] | None = None,
    target_modules: str | list[str] | None = None,
    **routing: Any,
) -> list[dict[str, Any]]:
    """
    Named parameter groups of a model: with weight decay, and (biases and norms) without.

    SWAN's are split once more, into `kind="swan"` and `kind="adam"`, and hold each parameter's route and the reason.
    All hold what was chosen (`lora_policy`; `lora_whitening`, `split_qkv`, `target_modules`), so that a state has it.
    SGD-SaI's are with `lora_policy="paired"`: LoRA's A and B stand in turn in groups with `paired=True`.

    Args:
        model (`torch.nn.Module`): Its trainable parameters are taken, each once.
        optim (`str`): Such as `"sgd_sai"`.
        weight_decay (`float`, *optional*, defaults to 0.0): Of the groups that decay.
        decay_names (iterable of `str`, *optional*): Names that decay. Defaults to the host Trainer's rule, put right
            by module: no norm of any library decays; the weights of linear layers, convolutions and embeddings do.
        target_modules (`str` or `list[str]`, *optional*): The modules that SWAN may whiten, as the host's
            `optim_target_modules` has it: a regular expression for the whole name, a list of names, parts of names or
            expressions, or `"all-linear"`. Defaults to all.
        routing: SWAN's `lora_whitening` (once `lora_policy`, which still works) and `split_qkv`, see
            [`hf_sai.optim.groups.swan_groups`]; SGD-SaI's `lora_policy`, see
            [`hf_sai.optim.lora_pairs.adapter_pairs`].

    Returns:
        `list[dict]`: Groups whose `"params"` are `("name", tensor)` pairs. An empty one is left out.

    Raises:
        `OptionError`: `target_modules` or `split_qkv` for an optimizer that whitens nothing.
        `ValueError`: Nothing is left for SWAN to whiten, or there is no pair.
    """
    record = get_record(optim)
    decays = decaying_names(model) if decay_names is None else {plain_name(name) for name in decay_names}
    chosen = {record.spelling(name): value for name, value in routing.items()}
    if len(chosen) < len(routing):
        raise OptionError(f"{', '.join(routing)} of {optim} are two names of one option; leave the older one out")
    if target_modules is not None:
        chosen["target_modules"] = target_modules
    accepted = inspect.signature(record.grouping).parameters
    refused = [name for name in chosen if name not in accepted]
    if refused:
        raise OptionError(
            f"{', '.join(refused)} can't be set for {optim}, which takes all tensors alike; leave it out"
        )
    if target_modules is not None:
        chosen["targets"] = _targets(target_modules)
    return record.grouping(model, weight_decay, decays, **chosen)


def _targets(target_modules: str | list[str] | None) -> Callable[[str, nn.Module], bool] | None:
    """The host's rule for `optim_target_modules`."""
    if target_modules is None:
        return None
    if isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear":
        return lambda name, module: isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return lambda name, module: target_module_matches(target_modules, name)


# The host's settings, by the argument that they are of a constructor here.
_HOST_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "betas": lambda args: (args.adam_beta1, args.adam_beta2),
    "eps": lambda args: args.adam_epsilon,
    "share_whitening": under_ddp,
}


@contextlib.contextmanager
def decay_rule(rule: Callable[[nn.Module], Iterable[str]]) -> Iterator[None]:
    """
    While it is open, handlers ask `rule(model)` which parameters decay: a Trainer subclass may have its own.
    The one of the host's Trainer is put right by [`decaying_names`].
    """
    is_hosts = getattr(rule, "__module__", "") == "transformers.trainer"
    token = _decay_rule.set(decaying_names if is_hosts else rule)
    try:
        yield
    finally:
        _decay_rule.reset(token)


def handle(name: str, context: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    """What the host's table does for a name of ours: `OptimizerContext` in, class and keyword arguments out."""
    record = get_record(name)
    args = context.args
    kwargs: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    kwargs |= {name: _HOST_SETTINGS[name](args) for name in record.host_settings}
    text = getattr(args, "optim_args", None)  # the host drops the spaces of a path
    given = parse_optim_args(text) if isinstance(text, str) else context.optim_args
    options, routing = _typed_options(record, given)
    _refuse_unsupported_modes(record, args, routing)
    kwargs |= options
    shown = ", ".join(f"{key}={value}" for key, value in [*kwargs.items(), *routing.items()] if key != "gsnr")
    logger.info("optim=%s: %s", record.name, shown)
    grouped = list(routing)
    if getattr(args, "optim_target_modules", None) is not None:
        routing["target_modules"] = args.optim_target_modules
    own_groups = settings_of_own_groups(args)
    if (record.needs_modules or grouped) and (own_groups or context.model is None):
        reason = f"the trainer's {own_groups[0]} makes" if own_groups else "the trainer gives no model and makes"
        raise OptionError(
            f"optim={record.name!r} is routed by the model's modules, but {reason} groups without them; leave out "
            "learning rates for parts of the model (loraplus_lr_ratio in LLaMA-Factory, lorap_lr_ratio in ms-swift, "
            "embedding_learning_rate in Unsloth), or "
            + (_without_modules() if record.needs_modules else f"leave out {', '.join(grouped)}")
        )
    if context.model is not None and not own_groups:
        names = _decay_rule.get()(context.model)
        kwargs["params"] = param_groups(context.model, record.name, args.weight_decay, decay_names=names, **routing)
    return record.cls, kwargs


def check_deepspeed(args: Any, config: dict[str, Any]) -> None:
    """Before a Trainer under DeepSpeed makes its optimizer, ours or that of the configuration."""
    name = str(getattr(args.optim, "value", args.optim))
    if name in {record.name for record in list_records()}:
        check_config(name, get_record(name), config)


def _without_modules() -> str:
    names = [record.name for record in list_records() if not (record.needs_modules or record.layerwise)]
    return f"use optim={names[0]!r}" if names else "choose another optimizer"


def _typed_options(record: OptimizerRecord, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Typed options: the constructor's, with the rows of the report that `gsnr` names in its place, and those that decide
    about groups.
    """
    options, routing = split_routing(record, parse_options(record, given))
    source = options.pop("gsnr", None)
    if isinstance(source, (str, os.PathLike)):
        options["gsnr"] = GSNRReport.from_pretrained(source).tensors
    elif source is not None:
        options["gsnr"] = getattr(source, "tensors", source)
    return options, routing


def _refuse_unsupported_modes(record: OptimizerRecord, args: Any, routing: Mapping[str, Any]) -> None:
    """What would give another result than asked for is an error before the first step."""
    mode = splitting_mode(args)
    if mode == "deepspeed":
        config = deepspeed_config(args)
        if config is not None and not is_left_out(args):
            check_config(record.name, record, config, routing)
    elif mode is not None:
        raise OptionError(
            f"optim={record.name!r} needs whole tensors, but {mode} is set and flattens them so that they can't be "
            'told apart; FSDP version 2 keeps them: set fsdp="full_shard" and fsdp_config={"version": 2} in the '
            "TrainingArguments, or fsdp_version: 2 under fsdp_config: in accelerate's file"
        )
    if not record.layerwise:
        return
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
                f"{value}; set it so, or use optim={record.ordinary!r}"
            )
