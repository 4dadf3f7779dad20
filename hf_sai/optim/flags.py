"""Flags that a device has yet to compute, read by the host once they are there, and not before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


# Where a copy to pinned memory goes on while the host does.
ASYNCHRONOUS = ("cuda",)


class LateFlags:
    """Flags on their way from a device to the host, each with what it is about."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Sequence[str], Tensor, Any]] = []

    def leave(self, names: Sequence[str], flags: Tensor) -> None:
        """
        Has flags copied without the host waiting for them (on CUDA; other devices copy at once).

        In a CUDA graph that is being captured nothing is left: what is replayed tells the host nothing.

        Args:
            names (sequence of `str`): One for each flag.
            flags (`torch.Tensor`): `[len(names)]`, bool, on a device.
        """
        if flags.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        later = flags.device.type in ASYNCHRONOUS
        there = torch.empty(
            flags.shape, dtype=torch.bool, device="cpu", pin_memory=later and torch.cuda.is_available()
        )
        there.copy_(flags, non_blocking=later)
        self._waiting.append((names, there, _recorded_event(flags.device) if later else None))

    def take_false(self) -> list[str]:
        """The names of false flags among those that have arrived. The others are left for a later call."""
        found: list[str] = []
        waiting, self._waiting = self._waiting, []
        for names, flags, event in waiting:
            if event is not None and not event.query():
                self._waiting.append((names, flags, event))
            else:
                found += [name for name, good in zip(names, flags.tolist(), strict=True) if not good]
        return found


def _recorded_event(device: torch.device) -> Any:
    """It has happened once the device has done all that was asked of it so far."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
