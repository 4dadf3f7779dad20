"""What a running optimizer is: unwrapped, checked, named, and whether it gets whole tensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from trainer_patches.script_optimizer import unwrapped as unwrap_optimizer

from .optim.names import named_parameters
from .optim.registry import OptionError, get_record, list_records, record_of
from .optim.tensors import is_sharded


logger = logging.getLogger(__name__)


class OptimizerMismatchError(ValueError, TypeError):
    """The optimizer that runs is not the one that was asked for, or not that of the model that is trained."""


def optim_name(args: Any) -> str:
    """`args.optim` as text, whether it is a member of the host's enum or a string (an unpickled one is)."""
    return str(getattr(args.optim, "value", args.optim))


def trains_ours(trainer: Any) -> bool:
    """
    Whether a Trainer trains with one of our optimizers: that it was given, or that it is going to make.

    Args:
        trainer (`transformers.Trainer`): Before or after its optimizer is made.
    """
    if trainer.optimizer is not None:
        return record_of(unwrap_optimizer(trainer.optimizer)) is not None
    choice = getattr(trainer, "optimizer_cls_and_kwargs", None)
    records = list_records()
    if choice is not None:
        return any(choice[0] is record.cls for record in records)
    return optim_name(trainer.args) in {record.name for record in records}


def begin_training(args: Any, model: Any, optimizer: Any) -> None:
    """
    What every Trainer's training begins with, once `hf_sai` is imported: that what steps is what was asked for, and
    that it holds what is trained; layer-wise updates are switched on.

    Args:
        args (`transformers.TrainingArguments`): Of the training.
        model (`torch.nn.Module`): That is trained.
        optimizer (`torch.optim.Optimizer`): As the Trainer has prepared it.

    Raises:
        `OptimizerMismatchError`: The optimizer is another one, or was made for another model.
    """
    name = optim_name(args)
    if name in {record.name for record in list_records()}:
        assert_optimizer(optimizer, name)
    live = unwrap_optimizer(optimizer)
    if record_of(live) is None:
        return
    if isinstance(model, nn.Module) and splitting_mode(args) is None:
        check_trains(live, model)
    if hasattr(live, "attach"):
        live.attach()


def end_training(optimizer: Any) -> None:
    """What every Trainer's training ends with: layer-wise updates are switched off."""
    live = unwrap_optimizer(optimizer)
    if record_of(live) is not None and hasattr(live, "detach"):
        live.detach()


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
            "leave out what replaced it: an `optimizers=` argument, a create_optimizer of your own, a host's setting "
            "(use_muon in LLaMA-Factory), or a launcher's config"
        )


def check_trains(optimizer: Optimizer, model: nn.Module) -> None:
    """
    Checks that an optimizer holds the trainable parameters of a model: it may have been made for another one, which
    PEFT, `model_init`, quantisation or new embeddings then replaced.

    It may hold more (frozen parameters that are unfrozen later, those of a loss), and on purpose less: that is a
    warning, as long as all that it holds is in the model.

    Args:
        optimizer (`torch.optim.Optimizer`): Without a wrapper.
        model (`torch.nn.Module`): That is trained.

    Raises:
        `OptimizerMismatchError`: It holds none of the trainable parameters, or some that were replaced by others.
    """
    everything = dict(model.named_parameters())
    trained = {name: param for name, param in everything.items() if param.requires_grad}
    held = {
        param: name
        for group in optimizer.param_groups
        for param, name in zip(group["params"], group.get("param_names") or [""] * len(group["params"]), strict=True)
    }
    inside = set(everything.values())
    missing = [name for name, param in trained.items() if param not in held]
    strangers = [name for param, name in held.items() if param not in inside]
    replaced = [name for name in strangers if name in everything]
    if not missing and not replaced:
        return
    live = type(optimizer).__name__
    lacks = f"{len(missing)} of the model's {len(trained)} trainable tensors ({_some(missing)})"
    if replaced or strangers or len(missing) == len(trained):
        held_elsewhere = f"{len(strangers)} of its {len(held)} tensors are not in that model ({_some(strangers)})"
        odd = [f"it lacks {lacks}"] * bool(missing) + [held_elsewhere] * bool(strangers)
        raise OptimizerMismatchError(
            f"{live} must be made for the model that is trained, but {', and '.join(odd)}; make it after PEFT, "
            "model_init, quantisation or new embeddings have changed the model, or set optim= in the arguments "
            "instead, which does so"
        )
    logger.warning(
        "%s does not train %s. Where that is meant, freeze them by requires_grad_(False): gradients cost memory.",
        live,
        lacks,
    )


def _some(names: Iterable[str]) -> str:
    """The first three of some names."""
    names = [name or "unnamed" for name in names]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def name_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """
    Gives every group the names of its parameters (`param_names`, as torch keeps them), where it has none.

    Args:
        optimizer (`torch.optim.Optimizer`): Without a wrapper.
        model (`torch.nn.Module`): Where the names come from. Those that are not in it are called
            `unnamed.0`, `unnamed.1` and so on.
    """
    if getattr(optimizer, "is_partitioned", False):
        return  # DeepSpeed ZeRO has put flat buffers in their place, and knows the names
    names = {param: name for name, param in named_parameters(model)}
    everywhere = [param for group in optimizer.param_groups for param in group["params"]]
    strangers = [param for param in everywhere if param not in names]
    names |= {param: f"unnamed.{index}" for index, param in enumerate(strangers)}
    for group in optimizer.param_groups:
        group.setdefault("param_names", [names[param] for param in group["params"]])


def count_measurements(optimizer: Any) -> int:
    """
    How much there is to report, to be compared with a later answer; what [`hf_sai.optim.base.NamedOptimizer`] does not
    say of itself is said by the number of tensors with a state.
    """
    return getattr(optimizer, "measurements", len(optimizer.state))


def splitting_mode(args: Any | None = None) -> str | None:
    """
    Name of the mode that splits or flattens parameters; `None` without one.

    FSDP version 2 keeps tensors as DTensors, which can be told. What DeepSpeed does is for its configuration to say.

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
