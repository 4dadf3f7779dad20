"""
Which gradients are finite: one pass over them, and no word from a device that is waited for.

On the CPU it is known at once. On an accelerator it stays there, as kernels take it (`found_inf`), and is read in the
next step, when it has long been there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tensors import is_sharded, local


@dataclass
class Found:
    """
    What is known of some gradients.

    Args:
        bad (`set[int]`): Indices of those that are not finite, as far as the host knows.
        on_device (`dict[int, torch.Tensor]`): By index, of those on accelerators: a float32 number without dimensions,
            1.0 where the gradient is not finite. Views of `tables`.
        tables (list of `(indices, tensor)`): The same, together.
    """

    bad: set[int] = field(default_factory=set)
    on_device: dict[int, Tensor] = field(default_factory=dict)
    tables: list[tuple[list[int], Tensor]] = field(default_factory=list)


def find_not_finite(gradients: Sequence[Tensor]) -> Found:
    """
    Looks for inf and NaN.

    A DTensor counts as the whole tensor: one small collective per mesh, in which all ranks have to take part.

    Args:
        gradients (sequence of `torch.Tensor`): Dense, of any floating dtype and device. Not written.
    """
    by_place: dict[Any, list[int]] = {}
    for index, gradient in enumerate(gradients):
        place: Any = gradient.device_mesh if is_sharded(gradient) else gradient.device  # type: ignore[attr-defined]
        by_place.setdefault(place, []).append(index)
    found = Found()
    for place, indices in by_place.items():
        there = [local(gradients[index]).detach() for index in indices]
        flags = _not_finite(there)
        if not isinstance(place, torch.device):
            for dim in range(place.ndim):
                group = place.get_group(dim)
                torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=group)
        if flags.device.type == "cpu":
            found.bad.update(index for index, flag in zip(indices, flags.tolist(), strict=True) if flag)
        else:
            found.tables.append((indices, flags))
            found.on_device.update(zip(indices, flags.unbind(), strict=True))
    return found


def _not_finite(gradients: list[Tensor]) -> Tensor:
    """`[k]` float32: 1.0 for a tensor with inf or NaN; 0.0 for one without elements."""
    device = gradients[0].device
    filled = [index for index, gradient in enumerate(gradients) if gradient.numel()]
    flags = torch.zeros(len(gradients), dtype=torch.float32, device=device)
    if not filled:
        return flags
    there = [gradients[index] for index in filled]
    if device.type == "cpu":
        # The Euclidean norm is ten times as fast there as the largest value, and may overflow: then look closely.
        norms = [torch.linalg.vector_norm(gradient).item() for gradient in there]
        odd = [not math.isfinite(norm) and not _all_finite(each) for norm, each in zip(norms, there, strict=True)]
        flags[filled] = torch.tensor(odd, dtype=torch.float32)
        return flags
    # The largest absolute value is finite only if all are, in every dtype.
    largest = torch.stack([norm.float() for norm in _by_dtype(there)])
    bad = largest.isfinite().logical_not_().to(torch.float32)
    return bad if len(filled) == len(gradients) else flags.index_copy_(0, torch.tensor(filled, device=device), bad)


def _all_finite(gradient: Tensor) -> bool:
    return bool(gradient.isfinite().all())


def _by_dtype(gradients: list[Tensor]) -> list[Tensor]:
    """The largest absolute value of each, in one launch per dtype."""
    found: list[Any] = [None] * len(gradients)
    for dtype in {gradient.dtype for gradient in gradients}:
        indices = [index for index, gradient in enumerate(gradients) if gradient.dtype == dtype]
        for index, norm in zip(indices, torch._foreach_norm([gradients[i] for i in indices], math.inf), strict=True):
            found[index] = norm
    return found


class LateNews:
    """Flags on their way from an accelerator, and what to do when they say that a gradient was not finite."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Any, list[Callable[[], None]]]] = []

    def send(self, flags: Tensor, actions: list[Callable[[], None]]) -> None:
        """
        Has flags copied to the host without waiting.

        Args:
            flags (`torch.Tensor`): `[k]` on an accelerator; not 0 where a gradient was not finite.
            actions (list of callables): One per flag.
        """
        there = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=flags.device.type == "cuda")
        there.copy_(flags, non_blocking=True)
        event = None
        if flags.device.type != "cpu":
            event = torch.Event(flags.device)
            event.record()
        self._waiting.append((there, event, actions))

    def read(self) -> None:
        """Calls the actions of those that were not finite; waits for the copies, which were asked for a step ago."""
        waiting, self._waiting = self._waiting, []
        for there, event, actions in waiting:
            if event is not None:
                event.synchronize()
            for flag, action in zip(there.tolist(), actions, strict=True):
                if flag:
                    action()
