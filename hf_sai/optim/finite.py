"""
Which gradients are finite: from the norm that clipping computed, or by a pass over them; no device is waited for.

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

from .clip_guard import norm_with
from .tensors import LIST_NUMEL, is_sharded, local


@dataclass
class Found:
    """
    What is known of some gradients.

    Args:
        bad (`set[int]`): Indices of those that are not finite, as far as the host knows.
        on_device (`dict[int, torch.Tensor]`): By index, of those on accelerators: a float32 number without dimensions,
            1.0 where any of the gradients there is not finite, as kernels take one for a whole list. One object for
            all gradients of a device or mesh.
        tables (list of `(indices, tensor)`): By device, mesh or norm, flags of gradients there: 1.0 where one is not
            finite, or one flag for all.
    """

    bad: set[int] = field(default_factory=set)
    on_device: dict[int, Tensor] = field(default_factory=dict)
    tables: list[tuple[list[int], Tensor]] = field(default_factory=list)


def find_not_finite(gradients: Sequence[Tensor], ranks: tuple[Any, torch.device] | None = None) -> Found:
    """
    Looks for inf and NaN.

    A DTensor counts as the whole tensor: one small collective per mesh, in which all ranks have to take part.

    Args:
        gradients (sequence of `torch.Tensor`): Dense, of any floating dtype and device. Not written.
        ranks (process group and device, *optional*): Of ranks that hold pieces of the same tensors, in the same
            order, and the device on which they talk.
    """
    found = Found()
    unknown = range(len(gradients)) if ranks else _by_their_norms(gradients, found)
    by_place: dict[Any, list[int]] = {}
    for index in unknown:
        gradient = gradients[index]
        place: Any = gradient.device_mesh if is_sharded(gradient) else gradient.device  # type: ignore[attr-defined]
        by_place.setdefault((place, gradient.dtype), []).append(index)
    for (place, _), indices in by_place.items():
        there = [local(gradients[index]) for index in indices]
        if ranks is None and isinstance(place, torch.device) and is_known_at_once(place):
            found.bad.update(indices[i] for i in _bad_ones(there))
            continue
        flags = flags_of(there)
        if ranks is not None:
            flags = over_ranks(flags, [ranks[0]], ranks[1])
        elif not isinstance(place, torch.device):
            flags = over_ranks(flags, *ranks_of(place))
        _take(found, indices, flags)
    return found


def _by_their_norms(gradients: Sequence[Tensor], found: Found) -> list[int]:
    """Notes what norms say that clipping has computed; which gradients are left."""
    if torch.compiler.is_compiling():
        return list(range(len(gradients)))
    norms = list(map(norm_with, gradients))
    by_norm: dict[int, list[int]] = {}
    for index, norm in enumerate(norms):
        by_norm.setdefault(id(norm), []).append(index)
    left = by_norm.pop(id(None), [])
    for indices in by_norm.values():
        norm = norms[indices[0]]
        assert norm is not None
        if is_known_at_once(norm.device):
            left += [] if math.isfinite(norm.item()) else indices
        elif is_captured(norm.device):  # a graph would replay a look at the memory of a norm from outside of it
            left += indices
        else:
            _take(found, indices, (norm.float() * 0.0).ne_(0.0).reshape(1))
    return sorted(left)


def _take(found: Found, indices: list[int], flags: Tensor) -> None:
    """Notes flags, one for each of the gradients or one for all."""
    if is_known_at_once(flags.device):
        found.bad.update(index for index, flag in zip(indices, flags.tolist(), strict=True) if flag)
        return
    found.tables.append((indices, flags))
    found.on_device.update(dict.fromkeys(indices, flags[0] if len(flags) == 1 else flags.amax()))


def ranks_of(mesh: Any) -> tuple[list[Any], torch.device]:
    """A mesh's groups, one for each dimension, and its device: under CPU offload the ranks can only talk there."""
    return [mesh.get_group(dim) for dim in range(mesh.ndim)], torch.device(mesh.device_type)


def over_ranks(flags: Tensor, groups: Sequence[Any], device: torch.device) -> Tensor:
    """
    Not 0 where a flag is not 0 on any rank: one small collective for each group.

    Args:
        flags (`torch.Tensor`): `[k]`, of this rank.
        groups (sequence of process groups): Of the ranks.
        device (`torch.device`): On which they talk.
    """
    there = flags.to(device)
    for group in groups:
        torch.distributed.all_reduce(there, op=torch.distributed.ReduceOp.MAX, group=group)
    return there.to(flags.device)


def is_known_at_once(device: torch.device) -> bool:
    """Whether to read from it is not to wait for it; a read would break a compiled step in two."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def flags_of(gradients: list[Tensor]) -> Tensor:
    """`[k]` float32, of gradients of one dtype: 1.0 for one with inf or NaN; 0.0 for one without elements."""
    first = gradients[0]
    if is_known_at_once(first.device):
        flags = torch.zeros(len(gradients))
        flags[_bad_ones(gradients)] = 1.0
        return flags
    small = [gradient for gradient in gradients if 0 < gradient.numel() <= LIST_NUMEL]
    norms = iter(torch._foreach_norm(small, math.inf) if small else ())
    empty = None if all(gradient.numel() for gradient in gradients) else first.new_zeros(())
    largest = [
        torch.linalg.vector_norm(gradient, math.inf)  # one launch, whatever its size
        if gradient.numel() > LIST_NUMEL
        else next(norms)
        if gradient.numel()
        else empty
        for gradient in gradients
    ]
    return torch.stack(largest).float().mul_(0.0).ne_(0.0)  # type: ignore[arg-type]


def _bad_ones(gradients: Sequence[Tensor]) -> list[int]:
    """Which gradients on the CPU, of one dtype, have inf or NaN."""
    # The Euclidean norm is ten times as fast there as the largest value, and may overflow: then look closely.
    finite = torch.stack(torch._foreach_norm(list(gradients))).isfinite()
    if bool(finite.all()):
        return []
    pairs = zip(finite.tolist(), gradients, strict=True)
    return [index for index, (good, gradient) in enumerate(pairs) if not good and not _all_finite(gradient)]


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
            flags (`torch.Tensor`): `[k]`, or `[1]` for all items; not 0 where a gradient was not finite.
            items (sequence): What [`LateNews.read`] gives back, `k` of them.
        """
        if is_captured(flags.device):
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
            found += [item for flag, item in zip(there.expand(len(items)).numpy(), items, strict=True) if flag]
        return found


def _recorded_event(device: torch.device) -> Any:
    """It has happened once the device has done all that was asked of it so far; `None` where nothing is waited for."""
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event
