"""
The update of SGD-SaI on lists of plain tensors, on three paths that mean the same.

- single: one tensor after the other, eager. Any dtype; bf16 and fp16 are computed in float32 and rounded once.
- foreach: `torch._foreach_*` over lists of one device and dtype. Temporaries up to `BLOCK_NUMEL` elements.
- fused: `torch._fused_sgd_`, the kernel of `torch.optim.SGD(fused=True)`, with the learning rate of each tensor:
  reads p, g, m and writes p, m in one pass. The decoupled decay, which the kernel has not, is made block by block
  just before it, so that the block is still in the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


logger = logging.getLogger(__name__)

# Elements per block: 4 MiB of float32. Measured on CPU: smaller blocks cost calls, larger ones leave the cache.
BLOCK_NUMEL = 1 << 20
# From this size on, one kernel launch per tensor is cheaper on an accelerator than the extra passes of foreach.
ACCELERATOR_FUSED_NUMEL = 1 << 20
_FUSED_DEVICES = ("cpu", "cuda")
# The fused kernel is right for these only: in torch 2.13 its CPU version gives wrong bf16 and fp16 results (see
# tests/test_updates.py), and it would round a parameter between the decay and the move.
_NATIVE = (torch.float32, torch.float64)


@dataclass
class Batch:
    """
    Tensors of one parameter group that are updated together; plain tensors, no DTensor.

    Args:
        momentum (`float`): Decay of the momentum buffers; 0.0 for none, and then `buffers` stays empty.
        decay (`float`): What the parameters are multiplied by: `1 - lr * weight_decay`.
        maximize (`bool`): Whether the gradients are negated.
        stochastic_rounding (`bool`): Whether bf16 parameters are rounded at random.
        params (`list[torch.Tensor]`): Written.
        grads (`list[torch.Tensor]`): Read. Shapes of `params`.
        buffers (`list[torch.Tensor]`): Written. Shapes of `params`, any floating dtype.
        step_sizes (`list[float]`): `lr * scale` of each tensor.
    """

    momentum: float
    decay: float
    maximize: bool
    stochastic_rounding: bool
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)

    def take(self, indices: Sequence[int]) -> Batch:
        """A batch of some of the tensors."""
        return Batch(
            self.momentum,
            self.decay,
            self.maximize,
            self.stochastic_rounding,
            [self.params[i] for i in indices],
            [self.grads[i] for i in indices],
            [self.buffers[i] for i in indices] if self.buffers else [],
            [self.step_sizes[i] for i in indices],
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, float]]:
        buffers: Sequence[Tensor | None] = self.buffers or [None] * len(self.params)
        return iter(zip(self.params, self.grads, buffers, self.step_sizes, strict=True))


def update(batch: Batch, foreach: bool | None = None, fused: bool | None = None) -> None:
    """
    Updates every tensor of a batch in place, each on the fastest path that it can take:
    `m <- momentum * m + (1 - momentum) * g`, then `p <- p * decay - step_size * m`.

    Args:
        batch (`Batch`): What to update.
        foreach (`bool`, *optional*): `None` means yes on accelerators, for small tensors.
        fused (`bool`, *optional*): `None` means yes, but for small tensors on accelerators; `True` means all that can.
    """
    by_path: dict[str, list[int]] = {"single": [], "foreach": [], "fused": []}
    for index, (param, grad, buffer, _) in enumerate(batch):
        by_path[_path(param, grad, buffer, batch, foreach, fused)].append(index)
    if fused and len(by_path["fused"]) < len(batch.params):
        _log_not_fused()
    if by_path["fused"]:
        _fused(batch if len(by_path["fused"]) == len(batch.params) else batch.take(by_path["fused"]))
    if by_path["foreach"]:
        _foreach(batch.take(by_path["foreach"]))
    for index in by_path["single"]:
        _single(batch.take([index]))


def _path(
    param: Tensor, grad: Tensor, buffer: Tensor | None, batch: Batch, foreach: bool | None, fused: bool | None
) -> str:
    """Which path a tensor takes."""
    same = grad.dtype == param.dtype and (buffer is None or buffer.dtype == param.dtype)
    if not same or param.dtype not in _NATIVE or not param.numel():
        return "single"
    on_cpu = param.device.type == "cpu"
    if fused is None:
        fused = not foreach and (on_cpu or param.numel() >= ACCELERATOR_FUSED_NUMEL)
    if torch.compiler.is_compiling():  # the kernel has no meta implementation; the compiler fuses by itself
        fused = False
    if fused and param.device.type in _FUSED_DEVICES and _is_flat(param, grad, buffer):
        return "fused"
    if foreach is None:
        foreach = not on_cpu
    return "foreach" if foreach and not batch.maximize else "single"


def _is_flat(param: Tensor, grad: Tensor, buffer: Tensor | None) -> bool:
    return param.is_contiguous() and grad.is_contiguous() and (buffer is None or buffer.is_contiguous())


def _log_not_fused() -> None:
    global _not_fused_logged
    if not _not_fused_logged:
        _not_fused_logged = True
        logger.info("fused=True: tensors of mixed or low precision, or not contiguous, take the single path.")


_not_fused_logged = False


# ---- fused ----


def _fused(batch: Batch) -> None:
    options: dict[str, Any] = {
        "weight_decay": 0.0,
        "momentum": batch.momentum,
        "dampening": batch.momentum,
        "nesterov": False,
        "maximize": batch.maximize,
        "is_first_step": False,
    }
    kernel = torch._fused_sgd_
    for param, grad, buffer, step_size in batch:
        buffers = [] if buffer is None else [buffer]
        if batch.decay == 1.0:
            kernel([param], [grad], buffers, lr=step_size, **options)
            continue
        tensors = (param, grad, *buffers)
        for block, block_grad, *block_buffer in _blocks(tensors):
            block.mul_(batch.decay)
            kernel([block], [block_grad], block_buffer, lr=step_size, **options)


# ---- foreach ----


def _foreach(batch: Batch) -> None:
    """One device and dtype at a time, in sublists whose temporaries stay below a block (or one large tensor)."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, param in enumerate(batch.params):
        groups.setdefault((param.device, param.dtype), []).append(index)
    for indices in groups.values():
        for sublist in _sublists(batch.params, indices):
            _foreach_sublist(batch.take(sublist))


def _foreach_sublist(batch: Batch) -> None:
    if batch.decay != 1.0:
        torch._foreach_mul_(batch.params, batch.decay)
    directions = batch.grads
    if batch.buffers:
        torch._foreach_lerp_(batch.buffers, batch.grads, 1.0 - batch.momentum)
        directions = batch.buffers
    moves = torch._foreach_mul(directions, [-step_size for step_size in batch.step_sizes])
    torch._foreach_add_(batch.params, moves)


def _sublists(params: list[Tensor], indices: list[int]) -> Iterator[list[int]]:
    sublist: list[int] = []
    total = 0
    for index in indices:
        if sublist and total + params[index].numel() > BLOCK_NUMEL:
            yield sublist
            sublist, total = [], 0
        sublist.append(index)
        total += params[index].numel()
    if sublist:
        yield sublist


# ---- single ----


def _single(batch: Batch) -> None:
    """Native precision needs no temporary and goes in one piece; the rest in blocks, to keep temporaries small."""
    for param, grad, buffer, step_size in batch:
        tensors = (param, grad) if buffer is None else (param, grad, buffer)
        native = param.dtype in _NATIVE and all(tensor.dtype == param.dtype for tensor in tensors)
        for block in [tensors] if native else _blocks(tensors):
            _step(batch, step_size, *block)


def _step(batch: Batch, step_size: float, param: Tensor, grad: Tensor, buffer: Tensor | None = None) -> None:
    wide = torch.promote_types(param.dtype, torch.float32)
    direction, sign = grad.to(wide), -1.0 if batch.maximize else 1.0
    if buffer is not None:
        average = buffer.to(wide)
        average.mul_(batch.momentum).add_(direction, alpha=sign * (1.0 - batch.momentum))
        if average is not buffer:
            buffer.copy_(average)
        direction, sign = average, 1.0
    values = param.to(wide)
    if batch.decay != 1.0:
        values.mul_(batch.decay)
    values.add_(direction, alpha=-sign * step_size)
    if values is param:
        return
    if batch.stochastic_rounding and param.dtype == torch.bfloat16:
        round_stochastically_(values)
    param.copy_(values)


def round_stochastically_(values: Tensor) -> Tensor:
    """
    Rounds float32 numbers, in place, to one of the two bf16 numbers around each, at random, so that the mean is right.

    bf16 is the upper half of float32: 16 random bits are added to the lower half, which is then cut off. Numbers that
    are not finite are left alone.

    Args:
        values (`torch.Tensor`): float32, contiguous; any shape.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device)
    noise.masked_fill_(~values.isfinite(), 0)
    bits.add_(noise).bitwise_and_(-65536)
    return values


def _blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of each tensor, `BLOCK_NUMEL` elements long; one piece where a tensor is not contiguous."""
    first = tensors[0]
    if first.numel() <= BLOCK_NUMEL or not all(tensor.is_contiguous() for tensor in tensors):
        yield tuple(tensors)
        return
    yield from zip(*(tensor.view(-1).split(BLOCK_NUMEL) for tensor in tensors), strict=True)
