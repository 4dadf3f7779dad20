"""What a running optimizer is: unwrapped, checked, named, and whether it gets whole tensors."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from .optim.registry import OptionError, get_record, record_of
from .optim.tensors import is_sharded


class OptimizerMismatchError(ValueError, TypeError):
    """The optimizer that runs is not the one that was asked for."""


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


def count_measurements(optimizer: Any) -> int:
    """
    How much there is to report, to be compared with a later answer; what [`hf_sai.optim.base.NamedOptimizer`] does not
    say of itself is said by the number of tensors with a state.
    """
    return getattr(optimizer, "measurements", len(optimizer.state))


def splitting_mode(args: Any | None = None) -> str | None:
    """
    What is set that hands the optimizer pieces that it can't tell from whole tensors; `None` where nothing is.

    FSDP version 2 keeps tensors as DTensors, which can be told.

    Args:
        args (`transformers.TrainingArguments`, *optional*): `None` asks for what a launcher has set only.

    Returns:
        `str` or `None`: `"deepspeed"` or `"fsdp version 1"`.
    """
    environment = os.environ
    launched = {
        mode: environment.get(f"ACCELERATE_USE_{mode.upper()}", "false").lower() in ("1", "true", "yes")
        for mode in ("deepspeed", "fsdp")
    }
    if launched["deepspeed"] or getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        return "deepspeed"
    if getattr(args, "fsdp", None):
        plugin = getattr(args, "fsdp_plugin_args", None) or {}
        config = getattr(args, "fsdp_config", None)
        version = plugin.get("fsdp_version", config.get("version", 1) if isinstance(config, dict) else 1)
    elif launched["fsdp"]:
        version = environment.get("FSDP_VERSION", "1")
    else:
        return None
    return None if str(version) == "2" else "fsdp version 1"


def under_ddp(args: Any) -> bool:
    """
    Whether the Trainer averages gradients over several processes that all step together and hold whole tensors.

    It wraps the model in DistributedDataParallel then, and steps only after a backward pass that averaged.

    Args:
        args (`transformers.TrainingArguments`): Of the run.
    """
    mode = getattr(getattr(args, "parallel_mode", None), "value", "")
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    sharded = launched or getattr(args, "fsdp", None) or splitting_mode(args) is not None
    return mode == "distributed" and not sharded and getattr(args, "parallelism_config", None) is None


def check_sharded(optimizer: Optimizer, args: Any) -> None:
    """
    Checks that FSDP, where it was asked for, is there: a host that can't shard (accelerate on CPUs) says nothing, and
    every process would train a copy of its own.

    Args:
        optimizer (`torch.optim.Optimizer`): Without a wrapper.
        args (`transformers.TrainingArguments`): With `fsdp` and `world_size`.

    Raises:
        `OptionError`: There are several processes, and no parameter is sharded.
    """
    if not getattr(args, "fsdp", None) or args.world_size == 1:
        return
    if not any(is_sharded(param) for group in optimizer.param_groups for param in group["params"]):
        raise OptionError(
            f"fsdp is set for {args.world_size} processes, but no parameter is sharded, so that each process would "
            "train a model of its own; leave fsdp out (DDP averages gradients), or run it on accelerators"
        )
