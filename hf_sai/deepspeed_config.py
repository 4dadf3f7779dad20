"""What a DeepSpeed configuration asks for, and which of it our optimizers can't do: said before anything trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .optim.registry import OptimizerRecord, OptionError


logger = logging.getLogger(__name__)

# Dotted names in the configuration with which the optimizers were never tried, and what they switch on.
_UNTRIED = {
    "zero_optimization.zenflow": "ZenFlow",
    "zero_optimization.mics_shard_size": "MiCS",
    "zero_optimization.zero_hpz_partition_size": "ZeRO++",
    "zero_optimization.zero_quantized_weights": "ZeRO++",
    "zero_optimization.zero_quantized_nontrainable_weights": "ZeRO++",
    "zero_optimization.zero_quantized_gradients": "ZeRO++",
    "zero_optimization.super_offload": "SuperOffload",
    "zero_optimization.offload_optimizer.super_offload": "SuperOffload",
    "zero_optimization.elastic_checkpoint": "elastic checkpoints",
    "checkpoint.load_universal": "universal checkpoints",
    "tensor_parallel": "AutoTP",
    "pipeline": "pipeline parallelism",
}


def deepspeed_config(args: Any) -> dict[str, Any] | None:
    """
    The configuration that a Trainer's arguments, after their `__post_init__`, or accelerate's launcher have made;
    `None` without DeepSpeed.
    """
    for holder in (getattr(args, "hf_deepspeed_config", None), getattr(args, "deepspeed_plugin", None)):
        holder = getattr(holder, "hf_ds_config", holder)
        config = getattr(holder, "config", None)
        if isinstance(config, dict):
            return config
    given = getattr(args, "deepspeed", None)
    return dict(given) if isinstance(given, Mapping) else None


def check_config(
    name: str, record: OptimizerRecord, config: Mapping[str, Any], routing: Mapping[str, Any] | None = None
) -> None:
    """
    Refuses with an `OptionError` what would train with another optimizer than `optim=name`, or in a way that was never
    tried; `routing` are the options that decide about groups.
    """
    if "optimizer" in config:
        kind = config["optimizer"].get("type", "one") if isinstance(config["optimizer"], Mapping) else "one"
        raise OptionError(
            f"optim={name!r} and the 'optimizer' section of the DeepSpeed configuration ({kind}) exclude each other: "
            "DeepSpeed would build its own and leave ours out; remove that section (the learning rate and weight "
            "decay of the TrainingArguments hold then)"
        )
    if record.layerwise:
        raise OptionError(
            f"optim={name!r} updates inside the backward pass, which DeepSpeed has to itself; use "
            f"optim={record.ordinary!r}"
        )
    if (routing or {}).get("lora_policy") == "paired" and _at(config, "zero_optimization.stage"):
        raise OptionError(
            f"optim={name!r} with lora_policy='paired' needs whole factors, but DeepSpeed ZeRO hands over pieces; use "
            "DDP or stage 0, or leave lora_policy out"
        )
    offload = _at(config, "zero_optimization.offload_optimizer") or {}
    device = str(offload.get("device", "none"))
    if device == "nvme" or _at(config, "zero_optimization.offload_param.device") == "nvme":
        raise OptionError(f"optim={name!r} was never tried with NVMe offload; use device 'cpu' or 'none'")
    if float(offload.get("ratio", 1.0)) != 1.0:
        raise OptionError(
            f"optim={name!r} needs offload_optimizer.ratio=1.0, but it is {offload['ratio']}, by which DeepSpeed "
            "trains a share of the tensors with AdamW; set it to 1.0"
        )
    if device != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise OptionError(
            f'optim={name!r} with offload_optimizer needs "zero_force_ds_cpu_optimizer": false in the DeepSpeed '
            "configuration, but it is true (its default), by which DeepSpeedCPUAdam takes its place; set it to false"
        )
    for place, mode in _UNTRIED.items():
        value = _at(config, place)
        if place == "tensor_parallel" and isinstance(value, Mapping):
            value = value.get("autotp_size")
        if _is_on(value):
            raise OptionError(
                f"optim={name!r} was never tried with {mode}, but the DeepSpeed configuration has "
                f"{place}={value!r}; leave it out"
            )


def is_left_out(args: Any) -> bool:
    """Whether accelerate leaves DeepSpeed out although it is configured, because of `use_cpu`; with a warning."""
    if not getattr(args, "use_cpu", False):
        return False
    logger.warning(
        "A DeepSpeed configuration is set, but use_cpu=True makes accelerate leave DeepSpeed out: this run trains "
        "without it. Leave out use_cpu (DS_ACCELERATOR=cpu runs DeepSpeed on CPUs), or the configuration."
    )
    return True


def _is_on(value: Any) -> bool:
    """Of a switch, a number of ranks (on from 2), a word, or a section of its own."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value > 1
    return bool(value) and value not in ("none", "auto")


def _at(config: Mapping[str, Any], place: str) -> Any:
    found: Any = config
    for key in place.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
