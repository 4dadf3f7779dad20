"""
What a training needs in memory, by optimizer, computed from shapes: nothing is allocated.

What the optimizers of torch and of the hosts keep is written down here per tensor, and tests hold it to the byte
against the optimizers themselves; ours, and any that a record adds, are asked.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .model_shapes import ModelShapes, Tensors, Training, llama_shapes
from .optim.base import NamedOptimizer
from .optim.registry import OptimizerRecord, OptionError, list_records
from .optim.tensors import optimizer_state_bytes


# bitsandbytes since 0.45: blocks of 256 elements with a float32 maximum each, smaller tensors in 32 bits, and two
# tables of 256 float32 numbers that all tensors share.
EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST_NUMEL, EIGHT_BIT_TABLES = 256, 4096, 2 * 256 * 4


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one optimizer's training, on each device."""

    optimizer: str  # of all_kinds()
    weights: int  # parameters and buffers of the model
    gradients: int  # of all that trains; of the largest tensor alone where updates are layer-wise
    state: int  # the tensors that the optimizer keeps
    extra: int  # the most that an update needs on top, for a while
    activations: int | None  # what a forward pass leaves for the backward pass; None where not counted
    checked: bool  # whether tests hold `state` against the optimizer itself; else it is its documented layout
    layerwise: bool = False  # whether updates are made inside the backward pass

    @property
    def total(self) -> int:
        """What an update needs: all but the activations, which are gone by then."""
        return self.weights + self.gradients + self.state + self.extra

    @property
    def peak(self) -> int:
        """
        The most that a step needs. Gradients are made while activations are let go, so the larger of both counts;
        layer-wise updates are made beside the activations.
        """
        activations, update = self.activations or 0, self.gradients + self.extra
        return self.weights + self.state + (activations + update if self.layerwise else max(activations, update))


@dataclass(frozen=True)
class _Kind:
    """What one optimizer keeps of one tensor, what an update needs on top, and what it keeps besides."""

    state: Callable[[Tensors], int]
    extra: Callable[[ModelShapes], int] = lambda model: 0  # written in place
    fixed: int = 0
    layerwise: bool = False
    checked: bool = True


def memory_rows(
    model: ModelShapes, optimizers: Sequence[str] | None = None, zero: int = 0, gpus: int = 1
) -> list[MemoryRow]:
    """
    What training a model needs, one row for each optimizer.

    Args:
        model (`ModelShapes`): From [`hf_sai.model_shapes.named_shapes`] or [`hf_sai.model_build.shapes_of`].
        optimizers (sequence of `str`, *optional*): Of [`all_kinds`]. Defaults to all.
        zero (`int`, *optional*, defaults to 0): Stage of ZeRO: state (1), gradients too (2), weights too (3, and FSDP)
            are divided by the number of GPUs.
        gpus (`int`, *optional*, defaults to 1): How many share them.

    Raises:
        `ValueError`: An optimizer is not known, or nothing trains.

    Example:

    ```python
    from hf_sai.memory import memory_rows
    from hf_sai.model_shapes import named_shapes

    for row in memory_rows(named_shapes("llama-2-7b")):
        print(row.optimizer, row.state)
    ```
    """
    if not model.trained:
        raise ValueError(
            "computing memory needs a parameter with requires_grad, but the model has none; unfreeze some"
        )
    rows = []
    kinds = all_kinds()
    for name in kinds if optimizers is None else optimizers:
        if name not in kinds:
            raise OptionError(f"{name!r} is not an optimizer of this table; choose of: {', '.join(kinds)}")
        kind = kinds[name]
        gradients = max(row.bytes for row in model.trained) if kind.layerwise else model.gradients
        state = kind.fixed + sum(row.count * kind.state(row) for row in model.trained)
        parts = ((3, model.weights), (2, gradients), (1, state))  # from which stage on each is shared
        weights, gradients, state = (-(-size // gpus) if zero >= stage else size for stage, size in parts)
        extra = kind.extra(model)
        rows.append(MemoryRow(name, weights, gradients, state, extra, model.activations, kind.checked, kind.layerwise))
    return rows


def _adamw(row: Tensors) -> int:
    """Two moments in the parameter's dtype, and a step count in float32."""
    return 2 * row.bytes + 4


def _adamw_8bit(row: Tensors) -> int:
    """Two moments of a byte an element, with a maximum per block; those of embeddings in 32 bits, as the host sets."""
    if row.embedding or row.numel < EIGHT_BIT_LEAST_NUMEL:
        return 2 * 4 * row.numel
    return 2 * (row.numel + 4 * -(-row.numel // EIGHT_BIT_BLOCK))


def _adafactor(row: Tensors) -> int:
    """Float32 means of rows and columns, of what has neither of every element; and the parameter's RMS."""
    if len(row.shape) < 2:
        return 4 * row.numel + 4
    return 4 * (math.prod(row.shape[:-1]) + math.prod(row.shape[:-2]) * row.shape[-1]) + 4


def _adafactor_extra(model: ModelShapes) -> int:
    """
    Two float32 tensors of the largest one's size, and the one before it, which is let go late; with low precision the
    gradient and the parameter too.
    """
    return max(row.numel * 4 * (3 if row.dtype == "float32" else 5) for row in model.trained)


_OF_OTHERS: dict[str, _Kind] = {
    "adamw": _Kind(_adamw),
    "adamw_8bit": _Kind(_adamw_8bit, fixed=EIGHT_BIT_TABLES, checked=False),
    "adafactor": _Kind(_adafactor, _adafactor_extra),
    "sgd": _Kind(lambda row: row.bytes),  # momentum in the parameter's dtype
}


def all_kinds() -> dict[str, _Kind]:
    """What can be computed: of torch and hosts, and every record; ordinary ones first."""
    found = dict(_OF_OTHERS)
    for record in sorted(list_records(), key=lambda record: record.layerwise):
        found[record.name] = _ours(record)
        if not record.layerwise and any(option.name == "state_dtype" for option in record.options):
            found[f"{record.name}_bf16_state"] = _ours(record, state_dtype="bfloat16")
    return found


def _ours(record: OptimizerRecord, **options: Any) -> _Kind:
    """
    Asked of the optimizer itself, on the meta device. A [`NamedOptimizer`] makes its state without a step, others in a
    first one.
    """

    def made(row: Tensors, count: int) -> Any:
        dtype = getattr(torch, row.dtype)
        params = [nn.Parameter(torch.empty(row.shape, dtype=dtype, device="meta")) for _ in range(count)]
        routes = {"routes": [row.route] * count} if record.rows == "routes" else {}
        return record.cls([{"params": params, **routes}], **{"lr": 1e-3, **options})

    def state(row: Tensors) -> int:
        optimizer = made(row, 1)
        if isinstance(optimizer, NamedOptimizer):
            for place in optimizer._params():
                optimizer._make_state(*place)
        else:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.empty_like(param)
            optimizer.step()
        return optimizer_state_bytes(optimizer)

    def extra(model: ModelShapes) -> int:
        if not hasattr(record.cls, "extra_bytes"):
            return 0
        return max(made(row, row.count).extra_bytes() for row in model.trained)

    return _Kind(state, extra, layerwise=record.layerwise)


def largest_llamas(
    card_bytes: int, optimizers: Sequence[str], training: Training | None = None, zero: int = 0, gpus: int = 1
) -> dict[str, tuple[int, int]]:
    """
    The largest [`hf_sai.model_shapes.llama_shapes`] whose training, not quantised, fits a card's bytes, activations
    included: layers and number of parameters, by optimizer; `(0, 0)` where not one layer fits.
    """

    def peak(layers: int, optimizer: str) -> int:
        return memory_rows(llama_shapes(layers, training), [optimizer], zero, gpus)[0].peak

    found = {}
    for optimizer in optimizers:
        too_many = 1
        while peak(too_many, optimizer) <= card_bytes:
            too_many *= 2
        fits = bisect.bisect_right(range(1, too_many), card_bytes, key=lambda layers: peak(layers, optimizer))
        found[optimizer] = (fits, llama_shapes(fits, training).parameters if fits else 0)
    return found
