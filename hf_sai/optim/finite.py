"""
Which gradients are finite: one pass over them, and no word from a device that is waited for.

On the CPU it is known at once. On an accelerator it stays there, as kernels take it (`found_inf`), and is read in the
next step, when it has long been there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tensors import is_sharded, local, upload


@dataclass
class Found:
    """
    What is known of some gradients.

    Args:
        bad (`set[int]`): Indices of those that are not finite, as far as the host knows.
        on_device (`dict[int, torch.Tensor]`): By index, of those on accelerators: a float32 number without dimensions,
            1.0 where any of the gradients there is not finite, as kernels take one for a whole list. One object for
            all gradients of a device or mesh.
        tables (list of `(indices, tensor)`): Of each device or mesh, which of its gradients are not finite.
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
    if all(type(gradient) is Tensor and is_known_at_once(gradient.device) for gradient in gradients):
        return Found({index for index, flag in enumerate(_bad_ones(gradients)) if flag}) if gradients else Found()
    for index, gradient in enumerate(gradients):
        place: Any = gradient.device_mesh if is_sharded(gradient) else gradient.device  # type: ignore[attr-defined]
        by_place.setdefault(place, []).append(index)
    found = Found()
    for place, indices in by_place.items():
        there = [local(gradients[index]).detach() for index in indices]
        flags = _not_finite(there)
        if not isinstance(place, torch.device):
            device = flags.device
            flags = flags.to(place.device_type)  # under FSDP2's CPU offload the ranks can only talk on their devices
            for dim in range(place.ndim):
                group = place.get_group(dim)
                torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=group)
            flags = flags.to(device)
        if is_known_at_once(flags.device):
            found.bad.update(index for index, flag in zip(indices, flags.tolist(), strict=True) if flag)
        else:
            found.tables.append((indices, flags))
            found.on_device.update(dict.fromkeys(indices, flags.amax()))
    return found


def is_known_at_once(device: torch.device) -> bool:
    """Whether to read from it is not to wait for it."""
    return device.type == "cpu"


def _not_finite(gradients: list[Tensor]) -> Tensor:
    """`[k]` float32: 1.0 for a tensor with inf or NaN; 0.0 for one without elements."""
    device = gradients[0].device
    if is_known_at_once(device):
        return torch.tensor(_bad_ones(gradients) or [False] * len(gradients), dtype=torch.float32)
    found = torch.zeros(len(gradients), dtype=torch.float32, device=device)
    for dtype in {gradient.dtype for gradient in gradients}:
        indices = [i for i, gradient in enumerate(gradients) if gradient.dtype == dtype and gradient.numel()]
        if indices:
            largest = torch.stack(torch._foreach_norm([gradients[i] for i in indices], math.inf))
            bad = largest.isfinite().logical_not_().to(torch.float32)
            if len(indices) == len(gradients):
                return bad
            found[upload(torch.tensor(indices), device)] = bad
    return found


def _bad_ones(gradients: Sequence[Tensor]) -> list[bool]:
    """Which gradients on the CPU have inf or NaN; an empty list where none has."""
    # The Euclidean norm is ten times as fast there as the largest value, and may overflow: then look closely.
    dtypes, norms = {gradient.dtype for gradient in gradients}, torch._foreach_norm(list(gradients))
    finite = torch.stack([norm.isfinite() for norm in norms]) if len(dtypes) > 1 else torch.stack(norms).isfinite()
    if bool(finite.all()):
        return []
    return [not good and not _all_finite(each) for good, each in zip(finite.tolist(), gradients, strict=True)]


def _all_finite(gradient: Tensor) -> bool:
    return bool(gradient.isfinite().all())


class LateNews:
    """Flags on their way from an accelerator, and what they are about."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Any, Sequence[Any]]] = []

    def send(self, flags: Tensor, items: Sequence[Any]) -> None:
        """
        Has flags copied to the host without waiting.

        Args:
            flags (`torch.Tensor`): `[k]`; not 0 where a gradient was not finite.
            items (sequence): What [`LateNews.read`] gives back, one per flag.
        """
        if flags.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # what is replayed tells the host nothing, and changes none of its values
        there = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=flags.device.type == "cuda")
        there.copy_(flags, non_blocking=True)
        self._waiting.append((there, _recorded_event(flags.device), items))

    def read(self) -> list[Any]:
        """The items of flags that are not 0; waits for the copies, which were asked for a step ago."""
        waiting, self._waiting = self._waiting, []
        found = []
        for there, event, items in waiting:
            if event is not None:
                event.synchronize()
            found += [item for flag, item in zip(there.numpy(), items, strict=True) if flag]
        return found


def _recorded_event(device: torch.device) -> Any:
    """It has happened once the device has done all that was asked of it so far; `None` where nothing is waited for."""
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event
