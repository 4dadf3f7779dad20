"""
Every private name of a host that this project uses, in one place.

Each one says: what it replaces, since when the host has it, and when it can be removed.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from enum import EnumMeta
from types import ModuleType
from typing import Any

from packaging.version import Version


OLDEST_TRANSFORMERS = "5.4"
FIRST_UNKNOWN_TRANSFORMERS = "6"
# The newest of each host that the tests ran with: what constraints.txt pins.
NEWEST_TRIED = {
    "transformers": "5.24.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "diffusers": "0.42.1",
    "huggingface_hub": "2.4.0",
}
# The function that reads `optim_args`, in `transformers.trainer_optimizer` and imported into `transformers.trainer`.
# Since transformers 5.0. Remove when the host's own message names what it could not read: up to 5.23 that is "not
# enough values to unpack".
OPTIM_ARGS_PARSER = "_parse_optim_args"


class UnsupportedHostError(ValueError, RuntimeError):
    """A host's version, or what it holds, is not one that the patches were made for."""


def seam(holder: Any, name: str, without: str) -> Any:
    """
    What a host has under a name that is patched; `None`, with one warning, where a version that nobody tried lacks it.

    A host that changed must not fail by what is added to it, and nobody should look for what is missing in vain.

    Args:
        holder (module or `type`): Of the host.
        name (`str`): The function or class in it.
        without (`str`): What does not work without it, in one sentence.
    """
    found = getattr(holder, name, None)
    if found is None:
        where = holder.__name__ if isinstance(holder, ModuleType) else f"{holder.__module__}.{holder.__qualname__}"
        host = where.split(".")[0]
        warnings.warn(
            f"{where}.{name} is needed but {host} {version_of(host)} lacks it, so {without}; install {host} <= "
            f"{NEWEST_TRIED.get(host, 'an older one')}, the newest that was tried",
            stacklevel=2,
        )
    return found


def version_of(package: str) -> str:
    """From the package's metadata, for importing a host takes seconds; `"not installed"` where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def is_newer_than_tried(package: str, version: str) -> bool:
    """
    Whether a release of a host has a newer minor version than any that was tried.

    Args:
        package (`str`): Such as `"trl"`; one that is not in `NEWEST_TRIED` is never newer.
        version (`str`): As [`version_of`] gives it.
    """
    tried = NEWEST_TRIED.get(package)
    known = tried is not None and version[:1].isdigit()
    return known and Version(version).release[:2] > Version(tried or "0").release[:2]


def check_transformers_version() -> None:
    """
    Raises `UnsupportedHostError` unless the installed transformers is one that the patches were made for.

    Reads the package's metadata; transformers is not imported.
    """
    installed = version_of("transformers")
    release = Version(installed if installed[:1].isdigit() else "0").release  # 6.0.0rc1 is a 6, not a 5
    if not Version(OLDEST_TRANSFORMERS).release <= release < Version(FIRST_UNKNOWN_TRANSFORMERS).release:
        raise UnsupportedHostError(
            f"optimizer names can be added to transformers >= {OLDEST_TRANSFORMERS} and < "
            f"{FIRST_UNKNOWN_TRANSFORMERS}, but {installed} is installed; install one of these, or pass the "
            "optimizer through the Trainer's own argument optimizer_cls_and_kwargs, which needs no patch"
        )


def optimizer_handlers(trainer_optimizer: ModuleType) -> dict[str, Callable[[Any], Any]]:
    """
    The table `_OPTIMIZER_HANDLERS` of `transformers.trainer_optimizer`: optimizer name to handler.

    Since transformers 5.0. Remove when transformers has a public function to register an optimizer.

    Raises:
        `UnsupportedHostError`: The table is gone.
    """
    return _needed(trainer_optimizer, "_OPTIMIZER_HANDLERS", dict)


def optimizer_names(training_args: ModuleType) -> Any:
    """
    The enum `OptimizerNames` of `transformers.training_args`. Since transformers 4. Remove with the table's.

    Raises:
        `UnsupportedHostError`: It is gone.
    """
    return _needed(training_args, "OptimizerNames", EnumMeta)


def _needed(module: ModuleType, name: str, kind: type) -> Any:
    found = getattr(module, name, None)
    if not isinstance(found, kind):
        raise UnsupportedHostError(
            f"optimizer names are added to {module.__name__}.{name}, but this transformers "
            f"({version_of('transformers')}) has no such table; install transformers >= {OLDEST_TRANSFORMERS} and <= "
            f"{NEWEST_TRIED['transformers']}, or use optimizer_cls_and_kwargs"
        )
    return found


def decay_parameter_names(model: Any) -> set[str]:
    """
    Names of the parameters that the host's Trainer applies weight decay to: no biases, no norms.

    `Trainer.get_decay_parameter_names` is public but bound to a trainer of which it uses nothing. Since transformers
    4.2. Remove when the host offers the rule as a function.
    """
    from transformers import Trainer

    return set(Trainer.get_decay_parameter_names(None, model))


def target_module_matches(target_modules: str | list[str], module_name: str) -> bool:
    """
    Whether the host's `optim_target_modules` means a module of that name.

    `transformers.trainer_utils.check_target_module_exists` is not documented. Since transformers 4.39. Remove when the
    host says where the rule is to be found.
    """
    from transformers.trainer_utils import check_target_module_exists

    return bool(check_target_module_exists(target_modules, module_name))


def trains_loaded_weights(model: Any) -> bool:
    """
    Whether most of what a model trains was loaded by the host's `from_pretrained`: not random, and no adapter.

    `from_pretrained` marks each parameter that it loads by `_is_hf_initialized`. Since transformers 5.0. Remove when a
    model says whether it was loaded: `config.name_or_path` is set by `from_config` of a loaded configuration too.
    """
    sizes = {True: 0, False: 0}
    for param in model.parameters():
        if param.requires_grad:
            sizes[getattr(param, "_is_hf_initialized", False)] += param.numel()
    return sizes[True] > sizes[False]


def settings_of_own_groups(args: Any) -> list[str]:
    """
    What is set in a host's arguments that makes its Trainer build groups with learning rates for parts of the model.

    The first four are axolotl's, whose `OptimizerMixin.create_optimizer` drops its groups where a handler gives some
    (seen at commit 0e4982e). `learning_rate_mapping` is sentence-transformers' (6.2), which takes tensors out of a
    handler's groups. The last three are ms-swift's (4.6), which hands its groups on beside a handler's. Remove each
    when its host takes a handler's groups as they are.
    """
    names = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio", "learning_rate_mapping")
    found = [name for name in (*names, "vit_lr", "aligner_lr") if getattr(args, name, None)]
    return found + ["optimizer"] * (getattr(args, "optimizer", None) == "multimodal")
