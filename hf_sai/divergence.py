"""Tells a run that diverges in its first steps: from one look at its first update, and from what the Trainer logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .optim.tensors import is_sharded


SAMPLES = 1024  # elements of each tensor that are looked at
# A first update at the peak rate over the weights: small models learn at 0.02 to 0.2 of it, and from 1 on no longer.
SAFE_SHARE = 0.1
FIRST_LOGS, LOOKS = 50, 20
FAR, EXPLODED, COLLAPSED, NO_GAIN = 1.5, 5.0, 0.05, 0.02


class DivergenceWatch:
    """
    Watches one training; every sign is told once, and only the first.

    The first update is compared with the weights: both are sampled before and after the first step whose learning rate
    is not 0, which costs one read from the device in the whole training. Later it takes what the Trainer logs.
    """

    def __init__(self) -> None:
        self._first: _Sample | None = None
        self._looks = LOOKS
        self._told = False
        self._logs: list[tuple[float, float]] = []  # loss and norm of the gradient

    def before_step(self, optimizer: Any) -> None:
        """
        Samples the weights, where the update that comes is the first.

        Args:
            optimizer (`torch.optim.Optimizer`): Without a wrapper.
        """
        self._first = _Sample.of(optimizer) if self._looks else None

    def after_step(self) -> str | None:
        """
        Compares the first update, at the peak of the schedule, with the weights.

        Returns:
            `str` or `None`: What to tell.
        """
        if self._first is None:
            return None
        ratio, rate = self._first.update_over_weights(), self._first.rate
        self._first = None
        self._looks = self._looks - 1 if ratio is None else 0
        if ratio is None or ratio <= 1.0:
            return None
        return self._tell(
            f"its first update is {ratio:.2g} times as large as its weights (root mean squares, at the peak learning "
            f"rate of {rate:g})",
            rate * SAFE_SHARE / ratio,
        )

    def on_log(self, logs: Mapping[str, Any], rate: float, fp16: bool = False) -> str | None:
        """
        Looks at the losses and norms of gradients of the first logs.

        Args:
            logs (mapping): What the Trainer logs.
            rate (`float`): The training's learning rate, for the remedy.
            fp16 (`bool`, *optional*, defaults to `False`): Whether an infinite norm is how the loss finds its scale.

        Returns:
            `str` or `None`: What to tell.
        """
        if "loss" not in logs or len(self._logs) == FIRST_LOGS:
            return None
        self._logs.append((float(logs["loss"]), float(logs.get("grad_norm") or 0.0)))
        sign = _sign(self._logs, fp16)
        return None if sign is None else self._tell(sign, rate / 10)

    def _tell(self, sign: str, rate: float) -> str | None:
        if self._told:
            return None
        self._told = True
        return (
            f"This run seems to diverge: {sign}. Stop it and try learning_rate={rate:.1g}, or have `hf-sai lr` find "
            "one for your model and data."
        )


def _sign(logs: list[tuple[float, float]], fp16: bool) -> str | None:
    start, norm = logs[0]
    losses, norms = zip(*logs[-5:], strict=True)
    if not math.isfinite(losses[-1]):
        return f"its loss is {losses[-1]}"
    if not fp16 and len(logs) > 1 and not any(map(math.isfinite, norms[-2:])):
        return f"the norm of its gradient is {norms[-1]}"
    if norm > 0.0:
        count, far, grew = 3, start + max(FAR * abs(start), 1.0), min(norms[-3:]) > EXPLODED * norm
    else:  # what a layer-wise optimizer has used is not there to be logged
        count, far, grew = 5, start + max(2 * FAR * abs(start), 1.0), True
    if len(logs) > count and min(losses[-count:]) > far and grew:
        return f"its loss began at {start:.3g} and is {losses[-1]:.3g}"
    stuck = min(losses) >= start - NO_GAIN * abs(start) and start > NO_GAIN
    if len(logs) > 5 and max(norms) < COLLAPSED * norm and stuck:
        return f"its gradient's norm fell from {norm:.3g} to {norms[-1]:.3g} while its loss is still {losses[-1]:.3g}"
    return None


class _Sample:
    """
    Up to so many elements of each tensor before an update.

    Args:
        params (`list[torch.Tensor]`): Whole tensors, none of them empty.
        peaks (`list[float]`): For each, the peak of its learning rate over what it is in this update.
        rate (`float`): The highest peak.
    """

    def __init__(self, params: list[Tensor], peaks: list[float], rate: float) -> None:
        self.rate = rate
        self._params = params
        self._before = self._now()
        counts = [min(SAMPLES, _some(param).numel()) for param in params]
        stands_for = [param.numel() / count for param, count in zip(params, counts, strict=True)]
        table = torch.tensor([peaks, stands_for]).repeat_interleave(torch.tensor(counts), dim=1)
        self._peaks, self._stands_for = table.to(self._before.device)

    @classmethod
    def of(cls, optimizer: Any) -> _Sample | None:
        """Of what an optimizer trains; `None` where its learning rate is 0, or where tensors are not whole."""
        held = [(param, group) for group in optimizer.param_groups for param in group["params"] if param.numel()]
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        split = getattr(optimizer, "is_partitioned", False) or any(is_sharded(param) for param, _ in held)
        if split or not held or not any(rates):
            return None
        peaks = [group.get("initial_lr", group["lr"]) / group["lr"] if group["lr"] else 0.0 for _, group in held]
        highest = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
        return cls([param for param, _ in held], [float(peak) for peak in peaks], highest)

    def _now(self) -> Tensor:
        device = self._params[0].device
        return torch.cat([_some(param).to(device, torch.float32) for param in self._params])

    def update_over_weights(self) -> float | None:
        """
        Of their root mean squares, at the peak. 0 where the weights are, or where that is no number; `None` where
        nothing moved: fp16 skips steps until its loss has found a scale.
        """
        moved = (self._now() - self._before) * self._peaks
        sums = torch.stack([moved.square() @ self._stands_for, self._before.square() @ self._stands_for]).tolist()
        if sums[0] == 0.0:
            return None
        return math.sqrt(sums[0] / sums[1]) if all(map(math.isfinite, sums)) and sums[1] else 0.0


def _some(param: Tensor) -> Tensor:
    """Evenly spaced elements."""
    flat = param.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
