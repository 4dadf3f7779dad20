"""Adam for what SWAN does not whiten: torch's own function, with moments in float32 whatever the parameter's dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .rounding import Rounding
from .sgd_update import blocks, unless
from .tensors import BLOCK_NUMEL, FUSED_DEVICES, LIST_NUMEL, copies, in_order, is_accelerator, sublists


@dataclass
class AdamBatch:
    """
    Plain tensors that are updated with the same options; all lists are of the same length.

    Args:
        params (`list[torch.Tensor]`): Written. Any floating dtype; computed in float32 or above, and rounded once.
        grads (`list[torch.Tensor]`): Read.
        means (`list[torch.Tensor]`): Of the gradient; written. float32 or float64.
        squares (`list[torch.Tensor]`): Means of the gradient's square; written. As `means`.
        steps (`list[torch.Tensor]`): Steps made before, float32 scalars on the parameters' devices; counted up.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def append(self, *tensors: Tensor) -> None:
        """Adds a parameter, its gradient, its two moments and its step."""
        for values, tensor in zip(self._lists(), tensors, strict=True):
            values.append(tensor)

    def take(self, indices: Sequence[int]) -> AdamBatch:
        """A batch of some of the tensors."""
        return AdamBatch(*([values[i] for i in indices] for values in self._lists()))

    def rows(self) -> Iterator[tuple[Tensor, ...]]:
        """Parameter, gradient, mean, square, step, one after the other."""
        return zip(*self._lists(), strict=True)

    def _lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.grads, self.means, self.squares, self.steps


def new_adam_state(param: Tensor) -> dict[str, Tensor]:
    """`step`, `exp_avg` and `exp_avg_sq` of a tensor; the moments in float32 or above, laid out as it is."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
    }


def adam_update(
    batch: AdamBatch, rounding: Rounding | None = None, found: Tensor | None = None, **options: Any
) -> None:
    """
    One step of Adam with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101), in place.

    What torch's fused kernel can take goes to it in one list. The rest goes through copies in the precision of its
    moments: a block at a time on the CPU, lists of tensors elsewhere.

    Args:
        batch (`AdamBatch`): What to update.
        rounding (`Rounding`, *optional*): Of low-precision parameters, if not to the nearest.
        found (`torch.Tensor`, *optional*): A float32 number without dimensions on the tensors' device; where it is not
            0, all tensors of the batch and their states stay as they are.
        options: Of `torch.optim.adamw.adamw`: `lr`, `beta1`, `beta2`, `eps`, `weight_decay`, `maximize`.
    """
    options["found_inf"] = found
    direct: dict[Any, AdamBatch] = {}
    copied: dict[Any, AdamBatch] = {}
    for row in batch.rows():
        param, grad, mean, square, step = row
        fuses = param.device.type in FUSED_DEVICES and in_order(param, grad, mean) and in_order(param, square)
        if fuses and grad.dtype == param.dtype == mean.dtype:
            direct.setdefault((param.device, param.dtype), AdamBatch()).append(*row)
        elif is_accelerator(param) and (param.numel() <= LIST_NUMEL or not in_order(param, mean, square)):
            key = (param.device, param.dtype, grad.dtype, mean.dtype, mean.is_contiguous())
            copied.setdefault(key, AdamBatch()).append(*row)
        else:
            _in_blocks(row[:4], step, rounding, options)
    for part in direct.values():
        _call(part, fused=True, options=options)
    for part in copied.values():
        for indices in sublists(part.params, LIST_NUMEL):
            _through_copies(part.take(indices), rounding, options)


def _through_copies(batch: AdamBatch, rounding: Rounding | None, options: dict[str, Any]) -> None:
    """A list of tensors of one device and one dtype each."""
    dtype = batch.means[0].dtype
    flat, params = copies(batch.params, dtype)
    moments = [batch.means, batch.squares]
    if not batch.means[0].is_contiguous():
        moments = [copies(values, dtype)[1] for values in moments]
    fused = batch.params[0].device.type in FUSED_DEVICES
    grads = copies(batch.grads, dtype)[1]
    _call(AdamBatch(params, grads, moments[0], moments[1], batch.steps), fused, options)
    if moments[0] is not batch.means:
        torch._foreach_copy_(batch.means, moments[0])
        torch._foreach_copy_(batch.squares, moments[1])
    if rounding is not None:
        rounding.before(flat, batch.params[0].dtype)
    torch._foreach_copy_(batch.params, params)


def _in_blocks(tensors: Sequence[Tensor], step: Tensor, rounding: Rounding | None, options: dict[str, Any]) -> None:
    """One tensor, block by block, which keeps copies small."""
    count = step.clone()
    for values, grad, mean, square in blocks(tensors, LIST_NUMEL if is_accelerator(step) else BLOCK_NUMEL):
        count = step.clone()
        wide = values.to(mean.dtype).contiguous()
        fused = values.device.type in FUSED_DEVICES and mean.is_contiguous() and square.is_contiguous()
        _call(AdamBatch([wide], [grad.to(mean.dtype).contiguous()], [mean], [square], [count]), fused, options)
        if rounding is not None:
            rounding.before(wide, values.dtype)
        values.copy_(wide)
    step.copy_(count)


def _call(batch: AdamBatch, fused: bool, options: dict[str, Any]) -> None:
    fused = fused and not torch.compiler.is_compiling()  # torch keeps the compiler from its kernel
    if not fused and options["found_inf"] is not None:
        with unless(options["found_inf"], batch.params, batch.means, batch.squares, batch.steps):
            _call(batch, fused=False, options={**options, "found_inf": None})
        return
    adamw(
        batch.params,
        batch.grads,
        batch.means,
        batch.squares,
        [],
        batch.steps,
        foreach=False,
        fused=fused,
        amsgrad=False,
        **options,
    )
