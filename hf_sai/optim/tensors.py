"""What all optimizers here ask of tensors: sharded or not, the gradient and whether it can be used, blocks, bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


_PLAIN = (Tensor, nn.Parameter)
# Elements per block of the temporaries that low precision needs: 4 MiB of float32.
BLOCK_NUMEL = 1 << 20
# Where torch has fused kernels that are used here.
FUSED_DEVICES = ("cpu", "cuda")
# Elements per list of tensors that accelerators take at once: what one launch of torch's multi-tensor kernels covers,
# 320 chunks of 2^16, so that longer lists would not save launches. 80 MiB for each float32 copy.
LIST_NUMEL = 320 << 16


def is_accelerator(tensor: Tensor) -> bool:
    """Whether calls are launches where it is, so that few calls for many tensors are worth a pass over memory."""
    return not tensor.is_cpu  # its device's type is a text that torch makes anew: five times as slow


def low_precision(dtype: torch.dtype) -> bool:
    """bf16 or fp16."""
    return dtype in (torch.bfloat16, torch.float16)


def in_order(first: Tensor, second: Tensor, third: Tensor | None = None) -> bool:
    """Whether equal positions in memory are equal elements, without gaps: what torch's fused kernels read by."""
    if first.is_contiguous():
        return second.is_contiguous() and (third is None or third.is_contiguous())
    dense = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
    return dense and second.stride() == first.stride() and (third is None or third.stride() == first.stride())


def sublists(tensors: Sequence[Tensor], numel: int) -> Iterator[list[int]]:
    """Indices of neighbours with up to `numel` elements together, or of one that has more."""
    found: list[int] = []
    total = 0
    for index, tensor in enumerate(tensors):
        if found and total + tensor.numel() > numel:
            yield found
            found, total = [], 0
        found.append(index)
        total += tensor.numel()
    if found:
        yield found


def upload(values: Tensor, device: torch.device) -> Tensor:
    """To a device, without the host waiting for it."""
    pin = device.type == "cuda" and torch.cuda.is_available()
    return (values.pin_memory() if pin else values).to(device, non_blocking=True)


def fetch(values: Tensor) -> list[Any]:
    """To the host, which waits for it: nothing else here reads a device."""
    return values.tolist()


def copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Contiguous copies in another dtype, in one piece of memory, which comes first."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    found = [piece.view(tensor.shape) for piece, tensor in zip(flat.split(sizes), tensors, strict=True)]
    torch._foreach_copy_(found, list(tensors))
    return flat, found


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 and tensor parallelism make them."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The piece of a DTensor that this rank holds (sharing its memory); any other tensor itself."""
    if type(tensor) in _PLAIN:  # nearly all are: no further question
        return tensor
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def buffer_dtype(dtype: torch.dtype) -> torch.dtype:
    """
    Of a momentum buffer beside a parameter of that dtype: the same, but float32 for float16. A buffer has the
    gradient's unit, and float16 ends at 6e-8 and at 65504.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def gradient_of(param: Tensor) -> Tensor:
    """The gradient; of a DTensor, laid out over the ranks as the parameter is."""
    grad = param.grad
    assert grad is not None
    if type(param) in _PLAIN or not is_sharded(param) or grad.placements == param.placements:  # type: ignore[attr-defined]
        return grad
    return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]


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


def whole_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of a parameter that DeepSpeed's ZeRO 3 has partitioned, whose own is `(0,)`; of any other its own."""
    return tuple(getattr(param, "ds_shape", param.shape))


def optimizer_state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors in the optimizer's state; of shards and pieces those of all ranks."""
    inner = getattr(optimizer, "per_tensor", optimizer)
    total = 0
    for param, state in inner.state.items():
        for value in state.values():
            if isinstance(value, Tensor):
                numel = value.numel() if value.shape != param.shape else math.prod(_shape_in(inner, param))
                total += numel * value.element_size()
    return total


def adamw_state_bytes(optimizer: Any) -> int:
    """Bytes of AdamW's two moments for the same tensors, in the parameters' dtype as torch keeps them."""
    inner = getattr(optimizer, "per_tensor", optimizer)
    return sum(
        2 * math.prod(_shape_in(inner, param)) * param.element_size()
        for group in inner.param_groups
        for param in group["params"]
        if param.requires_grad
    )


def _shape_in(optimizer: Any, param: Any) -> tuple[int, ...]:
    shape_of = getattr(optimizer, "shape_of", None)
    return tuple(param.shape) if shape_of is None else shape_of(param)
