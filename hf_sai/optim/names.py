"""A parameter's name, whatever has been put around its model: compilation, data parallelism, checkpointing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..optimizer_facts import WRAPPERS


_PEFT = "base_model.model."


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DistributedDataParallel and DataParallel."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def plain_name(name: str) -> str:
    """Without what wrappers inside a model put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def without_adapter(name: str) -> str:
    """Without what PEFT puts before the names of the model that it wraps."""
    return name.removeprefix(_PEFT)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As `named_parameters()` of the model inside all wrappers."""
    for name, param in unwrapped(model).named_parameters():
        yield plain_name(name), param
