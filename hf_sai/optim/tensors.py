"""What both optimizers ask of a parameter: whether it is sharded, its gradient, and whether that can be used."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 and tensor parallelism make them."""
    return type(tensor) is not Tensor and type(tensor) is not nn.Parameter and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The piece of a DTensor that this rank holds (sharing its memory); any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gradient_of(param: Tensor) -> Tensor:
    """The gradient; of a DTensor, laid out over the ranks as the parameter is."""
    grad = param.grad
    assert grad is not None
    if is_sharded(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return grad


def check_gradient(param: Tensor, name: str, optimizer: str) -> None:
    """Raises `RuntimeError` for a gradient that no optimizer here can use."""
    assert param.grad is not None
    if param.grad.layout != torch.strided:
        raise RuntimeError(
            f"{optimizer} needs dense gradients but that of {name} is {param.grad.layout}; "
            "build its embedding with sparse=False"
        )
    if param.is_complex():
        raise RuntimeError(
            f"{optimizer} needs real parameters but {name} is {param.dtype}; store it as real and view it as complex"
        )
