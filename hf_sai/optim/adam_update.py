"""Adam for what SWAN does not whiten: torch's own function, with moments in float32 whatever the parameter's dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .rounding import round_stochastically_
from .sgd_update import blocks
from .tensors import BLOCK_NUMEL, FUSED_DEVICES


# As BLOCK_NUMEL, on accelerators: 64 MiB for each float32 copy.
ACCELERATOR_BLOCK_NUMEL = 1 << 24


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


def adam_update(batch: AdamBatch, stochastic_rounding: bool = False, **options: Any) -> None:
    """
    One step of Adam with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101), in place.

    Args:
        batch (`AdamBatch`): What to update.
        stochastic_rounding (`bool`, *optional*, defaults to `False`): Of bf16 parameters.
        options: Of `torch.optim.adamw.adamw`: `lr`, `beta1`, `beta2`, `eps`, `weight_decay`, `maximize`.
    """
    together: dict[tuple[torch.device, torch.dtype], AdamBatch] = {}
    for param, grad, mean, square, step in batch.rows():
        tensors = (param, grad, mean, square)
        contiguous = all(tensor.is_contiguous() for tensor in tensors)  # torch's fused kernel reads memory in order
        if contiguous and grad.dtype == param.dtype == mean.dtype and param.device.type in FUSED_DEVICES:
            together.setdefault((param.device, param.dtype), AdamBatch()).append(*tensors, step)
        elif grad.dtype == param.dtype == mean.dtype:
            _call(AdamBatch([param], [grad], [mean], [square], [step]), fused=False, options=options)
        else:
            _low_precision(tensors, step, stochastic_rounding, options)
    for part in together.values():
        _call(part, fused=True, options=options)


def _low_precision(
    tensors: Sequence[Tensor], step: Tensor, stochastic_rounding: bool, options: dict[str, Any]
) -> None:
    """One tensor through copies in the precision of its moments, block by block."""
    count = step.clone()
    numel = BLOCK_NUMEL if step.device.type == "cpu" else ACCELERATOR_BLOCK_NUMEL
    for values, grad, mean, square in blocks(tensors, numel):
        count = step.clone()
        wide = values.to(mean.dtype).contiguous()
        fused = values.device.type in FUSED_DEVICES and mean.is_contiguous() and square.is_contiguous()
        _call(AdamBatch([wide], [grad.to(mean.dtype).contiguous()], [mean], [square], [count]), fused, options)
        if stochastic_rounding and values.dtype == torch.bfloat16:
            round_stochastically_(wide)
        values.copy_(wide)
    step.copy_(count)


def _call(batch: AdamBatch, fused: bool, options: dict[str, Any]) -> None:
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
