"""The gradient signal-to-noise ratio (g-SNR): pure functions of tensors, no optimizer in sight.

Source: Xu, Xiang, Cai, Wen, "No More Adam: Learning Rate Scaling at Initialization is All You Need",
arXiv 2412.11768, Algorithm 1. For a gradient `g` of `n` elements

    g_snr = ||g||_2 / (std(g) + eps)        std with n - 1, as torch.std and the authors' released code

which is `sqrt(n) * sqrt(1 + (mean / std)^2)` up to `sqrt((n - 1) / n)`: mostly the size of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


# Elements per pass: 2 MiB in float64 stays in cache, and the sum of 2^18 equal float32 numbers is exact in float64, so
# that a constant gradient is found to be exactly constant.
CHUNK_NUMEL = 1 << 18


@dataclass(frozen=True)
class GradientMoments:
    """
    Count, mean and sum of squared deviations of the elements of one gradient.

    The three combine exactly over pieces of a tensor (chunks here, shards on other ranks), which the norm and the
    standard deviation do not.

    Args:
        count (`int`): Number of elements.
        mean (`float`): Mean of the elements; inf or NaN where an element is.
        sum_of_squared_deviations (`float`): Sum of `(element - mean)^2`; inf or NaN where an element is.
        rounding (`float`): Relative rounding step of the gradient's dtype, `torch.finfo(dtype).eps`.
    """

    count: int
    mean: float
    sum_of_squared_deviations: float
    rounding: float

    @property
    def is_finite(self) -> bool:
        """Whether every element is finite."""
        return math.isfinite(self.mean) and math.isfinite(self.sum_of_squared_deviations)

    @property
    def is_zero(self) -> bool:
        """Whether every element is zero (also where there is none)."""
        return self.mean == 0.0 and self.sum_of_squared_deviations == 0.0

    @property
    def is_constant(self) -> bool:
        """
        Whether there is no standard deviation to divide by: one element, or elements that differ by less than their
        own dtype resolves (all equal, in exact arithmetic).
        """
        return self.count < 2 or self.std <= self.rounding * abs(self.mean)

    @property
    def norm(self) -> float:
        """The Euclidean norm of the gradient."""
        return math.sqrt(self.sum_of_squared_deviations + self.count * self.mean * self.mean)

    @property
    def std(self) -> float:
        """The standard deviation of the elements, with `n - 1` (0.0 for fewer than two elements)."""
        return math.sqrt(self.sum_of_squared_deviations / (self.count - 1)) if self.count > 1 else 0.0


def gradient_snr(moments: GradientMoments, eps: float) -> float:
    """
    g-SNR of a gradient that is finite, not all zero and not constant: `norm / (std + eps)` (Algorithm 1, line 4).

    Args:
        moments (`GradientMoments`): The gradient's moments.
        eps (`float`): Added to the standard deviation, in units of the gradient.

    Returns:
        `float`: The ratio, without unit.
    """
    return moments.norm / (moments.std + eps)


def fallback_snr(moments: GradientMoments) -> float:
    """
    What stands in for the g-SNR of a constant gradient: `sqrt(n)`, its value for a gradient with zero mean.

    The formula itself would give `norm / eps`, about 1e8: one step would move a scalar by 1e7.
    """
    return math.sqrt(moments.count)


def gradient_moments(gradients: Sequence[Tensor]) -> list[GradientMoments]:
    """
    Moments of each gradient, accumulated in float64 (float32 on devices that have no float64).

    Everything is computed where the gradients are and fetched once per device, so that measuring costs one
    synchronisation, not one per tensor. Extra memory: one chunk of `CHUNK_NUMEL` elements.

    Args:
        gradients (sequence of `torch.Tensor`): Dense floating-point tensors of any shape, dtype and device. Not
            written.

    Returns:
        `list[GradientMoments]`: One per gradient, in order.
    """
    by_device: dict[torch.device, list[int]] = {}
    for index, gradient in enumerate(gradients):
        by_device.setdefault(gradient.device, []).append(index)
    fetched: dict[int, tuple[float, float]] = {}
    for indices in by_device.values():
        pairs = torch.stack([_mean_and_deviations(gradients[index]) for index in indices]).tolist()
        fetched.update(zip(indices, ((mean, deviations) for mean, deviations in pairs), strict=True))
    return [
        GradientMoments(gradient.numel(), *fetched[index], rounding=torch.finfo(gradient.dtype).eps)
        for index, gradient in enumerate(gradients)
    ]


def _mean_and_deviations(gradient: Tensor) -> Tensor:
    """`[mean, sum of squared deviations]` of one gradient, on its device, chunk by chunk (Chan et al., 1979)."""
    dtype = torch.float32 if gradient.device.type == "mps" else torch.float64
    mean = torch.zeros((), dtype=dtype, device=gradient.device)
    deviations = torch.zeros_like(mean)
    count = 0
    for chunk in gradient.detach().flatten().split(CHUNK_NUMEL):
        if chunk.numel() == 0:  # an empty tensor still splits into one empty chunk
            continue
        values = chunk.to(dtype)
        chunk_mean = values.mean()
        total = count + values.numel()
        shift = chunk_mean - mean
        deviations = (
            deviations + (values - chunk_mean).square_().sum() + shift.square() * (count * values.numel() / total)
        )
        mean = mean + shift * (values.numel() / total)
        count = total
    return torch.stack([mean, deviations])
