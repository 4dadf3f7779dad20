"""Our optimizers as choices of the hosts: table handlers, the route without patches, groups with names, a check."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from trainer_patches.compat import decay_parameter_names, settings_of_own_groups, target_module_matches

from .live import splitting_mode
from .optim.lora_pairs import adapter_pairs
from .optim.registry import (
    OptimizerRecord,
    OptionError,
    get_record,
    parse_options,
    split_routing,
)
from .optim.routing import ADAM, route_parameters, summary
from .report import GSNRReport


logger = logging.getLogger(__name__)

_decay_rule: ContextVar[Callable[[nn.Module], Iterable[str]]] = ContextVar("decay_rule", default=decay_parameter_names)


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
    choice = optimizer_cls_and_kwargs("sgd_sai", lr=0.1, normalize="none")
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
    elif record.routed or routing:
        raise OptionError(
            f"{name}{' with lora_policy' * (not record.routed)} is routed by the model's modules, but this route was "
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
    SGD-SaI's are with `lora_policy="paired"`: LoRA's A and B stand in turn in groups with `paired=True`.

    Args:
        model (`torch.nn.Module`): Its trainable parameters are taken, each once.
        optim (`str`): Such as `"sgd_sai"`.
        weight_decay (`float`, *optional*, defaults to 0.0): Of the groups that decay.
        decay_names (iterable of `str`, *optional*): Names that decay. Defaults to the host Trainer's rule.
        target_modules (`str` or `list[str]`, *optional*): The modules that SWAN may whiten, as the host's
            `optim_target_modules` has it: a regular expression for the whole name, a list of names, parts of names or
            expressions, or `"all-linear"`. Defaults to all.
        routing: SWAN's `lora_policy` and `split_qkv`, see [`hf_sai.optim.route_parameters`]; SGD-SaI's `lora_policy`,
            see [`hf_sai.optim.lora_pairs.adapter_pairs`].

    Returns:
        `list[dict]`: Groups whose `"params"` are `("name", tensor)` pairs. An empty one is left out.

    Raises:
        `OptionError`: `target_modules` or `split_qkv` for an optimizer that whitens nothing.
        `ValueError`: Nothing is left for SWAN to whiten, or there is no pair.
    """
    record = get_record(optim)
    decays = set(decay_parameter_names(model) if decay_names is None else decay_names)
    if not record.routed:
        lora_policy = routing.pop("lora_policy", "plain")
        given = [*routing, *(["target_modules"] if target_modules is not None else [])]
        if given:
            raise OptionError(
                f"{', '.join(given)} can't be set for {optim}, which takes all tensors alike; leave it out"
            )
        return _sgd_sai_groups(model, weight_decay, decays, adapter_pairs(model, lora_policy))
    routes = route_parameters(model, _targets(target_modules), **routing)
    logger.info("%s: %s", optim, summary([(row.route, row.reason, row.param.numel()) for row in routes]))
    groups = []
    for kind in ("swan", "adam"):
        for decay in (True, False):
            rows = [row for row in routes if (row.route == ADAM) == (kind == "adam") and (row.name in decays) == decay]
            groups.append(
                {
                    "params": [(row.name, row.param) for row in rows],
                    "weight_decay": weight_decay * decay,
                    "kind": kind,
                    "routes": [row.route for row in rows],
                    "reasons": [row.reason for row in rows],
                }
            )
    return _without_empty(groups)


def _sgd_sai_groups(
    model: nn.Module, weight_decay: float, decays: set[str], pairs: list[tuple[Tensor, Tensor]]
) -> list[dict[str, Any]]:
    """With and without decay; after them the pairs, likewise, A and B in turn."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    names: dict[Tensor, str] = {param: name for name, param in named}
    in_pairs = {param for pair in pairs for param in pair}
    groups: list[dict[str, Any]] = []
    for paired in (False, True):
        for decay in (True, False):
            if paired:
                chosen = [pair for pair in pairs if (names[pair[0]] in decays) == decay]
                params = [(names[param], param) for pair in chosen for param in pair]
            else:
                params = [row for row in named if row[1] not in in_pairs and (row[0] in decays) == decay]
            mark = {"paired": True} if paired else {}
            groups.append({"params": params, "weight_decay": weight_decay * decay, **mark})
    return _without_empty(groups)


def _without_empty(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def _targets(target_modules: str | list[str] | None) -> Callable[[str, nn.Module], bool] | None:
    """The host's rule for `optim_target_modules`."""
    if target_modules is None:
        return None
    if isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear":
        return lambda name, module: isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return lambda name, module: target_module_matches(target_modules, name)


@contextlib.contextmanager
def decay_rule(rule: Callable[[nn.Module], Iterable[str]]) -> Iterator[None]:
    """While it is open, handlers ask `rule(model)` which parameters decay: a Trainer subclass may have its own."""
    token = _decay_rule.set(rule)
    try:
        yield
    finally:
        _decay_rule.reset(token)


def handle(name: str, context: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    """What the host's table does for a name of ours: `OptimizerContext` in, class and keyword arguments out."""
    record = get_record(name)
    args = context.args
    _refuse_unsupported_modes(record, args)
    kwargs: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if record.routed:
        kwargs |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    options, routing = _typed_options(record, context.optim_args)
    kwargs |= options
    shown = ", ".join(f"{key}={value}" for key, value in [*kwargs.items(), *routing.items()] if key != "gsnr")
    logger.info("optim=%s: %s", record.name, shown)
    if getattr(args, "optim_target_modules", None) is not None:
        routing["target_modules"] = args.optim_target_modules
    own_groups = settings_of_own_groups(args)
    grouped = record.routed or routing.get("lora_policy") == "paired"
    if grouped and (own_groups or context.model is None):
        reason = f"the trainer's {own_groups[0]} makes" if own_groups else "the trainer gives no model and makes"
        raise OptionError(
            f"optim={record.name!r} is routed by the model's modules, but {reason} groups without them; leave out "
            "learning rates for parts of the model (embedding_learning_rate in Unsloth), or use optim='sgd_sai'"
            + " without lora_policy"
            * (not record.routed)
        )
    if context.model is not None and not own_groups:
        names = _decay_rule.get()(context.model)
        kwargs["params"] = param_groups(context.model, record.name, args.weight_decay, decay_names=names, **routing)
    return record.cls, kwargs


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


def _refuse_unsupported_modes(record: OptimizerRecord, args: Any) -> None:
    """What would give another result than asked for is an error before the first step."""
    mode = splitting_mode(args)
    if mode is not None:
        raise OptionError(
            f"optim={record.name!r} needs whole tensors, but {mode} is set and flattens or splits them so that they "
            "can't be told apart; use DDP (without deepspeed and fsdp, in accelerate's config too) or FSDP version 2 "
            "(fsdp_config={'version': 2}; fsdp_version: 2 in accelerate's config), or choose another optimizer"
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
