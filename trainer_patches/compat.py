"""
Every private name of a host that this project uses, in one place.

Each one says: what it replaces, since when the host has it, and when it can be removed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import Any

from packaging.version import Version


OLDEST_TRANSFORMERS = "5.2"
FIRST_UNKNOWN_TRANSFORMERS = "6"
# The function that reads `optim_args`, in `transformers.trainer_optimizer` and imported into `transformers.trainer`.
# Since transformers 5.0. Remove when the host's own message names what it could not read: up to 5.23 that is "not
# enough values to unpack".
OPTIM_ARGS_PARSER = "_parse_optim_args"


class UnsupportedHostError(ValueError, RuntimeError):
    """A host's version, or what it holds, is not one that the patches were made for."""


def check_transformers_version() -> None:
    """
    Raises `UnsupportedHostError` unless the installed transformers is one that the patches were made for.

    Reads the package's metadata; transformers is not imported.
    """
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        installed = "0 (no metadata)"
    release = Version(installed.split()[0]).release  # 6.0.0rc1 is a 6, whatever the order of pre-releases
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
    table = getattr(trainer_optimizer, "_OPTIMIZER_HANDLERS", None)
    if not isinstance(table, dict):
        raise UnsupportedHostError(
            "optimizer names are added to transformers.trainer_optimizer._OPTIMIZER_HANDLERS, but this transformers "
            f"({importlib.metadata.version('transformers')}) has no such table; install transformers >= "
            f"{OLDEST_TRANSFORMERS} and < {FIRST_UNKNOWN_TRANSFORMERS}, or use optimizer_cls_and_kwargs"
        )
    return table


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


def settings_of_own_groups(args: Any) -> list[str]:
    """
    What is set in a host's arguments that makes its Trainer build groups with learning rates for parts of the model.

    axolotl's `OptimizerMixin.create_optimizer` has these four, and drops its groups where a handler gives some. Seen
    at commit 0e4982e. Remove when it keeps them.
    """
    names = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")
    return [name for name in names if getattr(args, name, None)]
