"""The gradient signal-to-noise ratio (g-SNR): pure functions of tensors, no optimizer in sight.

Source: Xu, Xiang, Cai, Wen, "No More Adam: Learning Rate Scaling at Initialization is All You Need",
arXiv 2412.11768, Algorithm 1. For a gradient `g` of `n` elements

    g_snr = ||g||_2 / (std(g) + eps)        std with n - 1, as torch.std and the authors' released code

which is `sqrt(n) * sqrt(1 + (mean / std)^2)` up to `sqrt((n - 1) / n)` (and what `eps` adds to the deviation):
mostly the size of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tensors import fetch, is_accelerator, is_sharded, local, sublists, upload


# Elements per pass: 2 MiB in float64 stays in cache, and the sum of 2^18 equal float32 numbers is exact in float64, so
# that a constant gradient is found to be exactly constant.
CHUNK_NUMEL = 1 << 18
# On accelerators a pass is two launches: 64 MiB in float64, in rows that keep every block of threads busy. Tensors up
# to the third size are stacked with those of their size, one row each.
ACCELERATOR_CHUNK_NUMEL, ROW_NUMEL, STACKED_NUMEL = 1 << 23, 1 << 14, 1 << 21

NORMALIZATIONS = ("none", "max", "rms")


@dataclass(frozen=True)
class TensorGSNR:
    """
    What SGD-SaI knows of one tensor; a row of the g-SNR report.

    Args:
        name (`str`): The parameter's name where the groups carry names, else `group<i>.<j>`.
        shape (`tuple[int, ...]`): Shape of the parameter (of all shards together).
        numel (`int`): Number of elements.
        group (`int`): Index of its parameter group.
        gsnr (`float`): Measured g-SNR, `sqrt(numel)` for a fallback, 0.0 while pending.
        scale (`float`): What the learning rate is multiplied by: `gsnr`, divided by its maximum or by an RMS under
            `normalize="max"` and `"rms"`.
        step (`int`): Optimizer step (from 1) of its first informative gradient, 0 while there was none.
        status (`str`): `"measured"`, `"fallback"` (constant gradient or one element), `"given"` (from another run) or
            `"pending"` (no gradient yet that is finite and not all zero).
        gradient_norm (`float`, *optional*, defaults to 0.0): Euclidean norm of that gradient; 0.0 where not known.
        weight_rms (`float`, *optional*, defaults to 0.0): Root mean square of the parameter before that step; 0.0
            where it was all zero, or is not known.
        factor (`float`, *optional*, defaults to 1.0): What that gradient was multiplied by besides the scale, as those
            of LoRA's pairs are: `learning rate * scale * factor * gradient` is the first update.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    group: int
    gsnr: float
    scale: float
    step: int
    status: str
    gradient_norm: float = 0.0
    weight_rms: float = 0.0
    factor: float = 1.0


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
    g-SNR of a gradient that is finite, not all zero and not constant: `norm / (std + eps)` (Algorithm 1), and at least
    `sqrt(n - 1)`, which is the least that `norm / std` can be.

    The bound only keeps `eps` from being felt. Where a deviation is near `eps` the formula alone would give next to
    nothing, for good: the gradient of LoRA's A, just after the first small step of a warm-up moved B from 0, is that
    small. Constant gradients, which `eps` is for, do not come here.

    Args:
        moments (`GradientMoments`): The gradient's moments.
        eps (`float`): Added to the standard deviation, in units of the gradient.

    Returns:
        `float`: The ratio, without unit.
    """
    return max(moments.norm / (moments.std + eps), math.sqrt(moments.count - 1))


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
    synchronisation, not one per tensor. Extra memory: one chunk in float64, of `CHUNK_NUMEL` elements on the CPU, of
    `ACCELERATOR_CHUNK_NUMEL` elsewhere.

    A DTensor counts as the whole tensor: the moments of its shards are combined over its mesh, in one collective per
    mesh dimension for all gradients together. All ranks have to call this with the same gradients.

    Args:
        gradients (sequence of `torch.Tensor`): Dense floating-point tensors of any shape, dtype and device. Not
            written.

    Returns:
        `list[GradientMoments]`: One per gradient, in order.
    """
    by_place: dict[Any, list[int]] = {}
    for index, gradient in enumerate(gradients):
        place: Any = getattr(gradient, "device_mesh", gradient.device) if is_sharded(gradient) else gradient.device
        by_place.setdefault(place, []).append(index)
    fetched: dict[int, list[float]] = {}
    for place, indices in by_place.items():
        there = [gradients[index] for index in indices]
        table = local_moments([local(gradient).detach() for gradient in there])
        if not isinstance(place, torch.device):
            table = _combine_over_mesh(table, there, place)
        fetched.update(zip(indices, fetch(table), strict=True))
    return [
        GradientMoments(gradient.numel(), fetched[index][1], fetched[index][2], torch.finfo(gradient.dtype).eps)
        for index, gradient in enumerate(gradients)
    ]


def local_moments(gradients: Sequence[Tensor]) -> Tensor:
    """`[len(gradients), 3]`: count, mean and sum of squared deviations of plain tensors of one device."""
    if is_accelerator(gradients[0]):
        return moments_in_rows(gradients)
    return torch.stack([_local_moments(gradient) for gradient in gradients])


def moments_in_rows(gradients: Sequence[Tensor]) -> Tensor:
    """
    As `[_local_moments(gradient)]`, in few calls: variances and means of rows first, then of the tensors from those.

    Args:
        gradients (sequence of `torch.Tensor`): Plain tensors of one device.

    Returns:
        `torch.Tensor`: `[len(gradients), 3]`; zeros for an empty tensor.
    """
    device = gradients[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    owners: list[int] = []  # of runs of rows
    counts: list[int] = []  # rows per run
    lengths: list[Tensor] = []  # elements of each row
    found: list[tuple[Tensor, ...]] = []
    for run, rows in _rows(gradients):
        found.append(torch.var_mean(rows.to(dtype), dim=1, correction=0))
        lengths.append(torch.full(rows.shape[:1], rows.shape[1], dtype=dtype))
        if len(run) == 1 and owners[-1:] == run:  # goes on
            counts[-1] += len(rows)
        else:
            owners += run
            counts += [len(rows) // len(run)] * len(run)
    table = torch.zeros(len(gradients), 3, dtype=dtype, device=device)
    if not found:
        return table
    length = upload(torch.cat(lengths), device)
    sizes = upload(torch.tensor([gradients[owner].numel() for owner in owners], dtype=dtype), device)
    runs = upload(torch.tensor(counts), device)
    variances, means = (torch.cat([pair[i] for pair in found]) for i in (0, 1))
    mean = _sum_of_runs(means * length, runs) / sizes
    shifts = means - mean.repeat_interleave(runs, output_size=len(means))
    deviations = _sum_of_runs((variances + shifts.square_()) * length, runs)
    table[upload(torch.tensor(owners), device)] = torch.stack([sizes, mean, deviations], dim=1)
    return table


def _rows(gradients: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Rows `[r, n]` of a chunk, and the tensors that they belong to: each to one of many, or all to one."""
    small: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, gradient in enumerate(gradients):
        if 0 < gradient.numel() <= STACKED_NUMEL:
            small.setdefault((gradient.numel(), gradient.dtype), []).append(index)
    for indices in small.values():
        flat = [gradients[index].reshape(-1) for index in indices]
        for part in sublists(flat, ACCELERATOR_CHUNK_NUMEL):
            yield [indices[i] for i in part], torch.stack([flat[i] for i in part])
    for index, gradient in enumerate(gradients):
        if gradient.numel() > STACKED_NUMEL:
            flat_one = gradient.reshape(-1)
            whole = len(flat_one) // ROW_NUMEL * ROW_NUMEL
            for chunk in flat_one[:whole].split(ACCELERATOR_CHUNK_NUMEL):
                yield [index], chunk.view(-1, ROW_NUMEL)
            if whole < len(flat_one):
                yield [index], flat_one[whole:].unsqueeze(0)


def _sum_of_runs(values: Tensor, runs: Tensor) -> Tensor:
    """Sums of neighbours, in their order, so that all ranks find the same; nothing is read to check `runs`."""
    return torch.segment_reduce(values, "sum", lengths=runs, unsafe=True)


def _local_moments(gradient: Tensor) -> Tensor:
    """`[count, mean, sum of squared deviations]` of one tensor, on its device, chunk by chunk."""
    dtype = torch.float32 if gradient.device.type == "mps" else torch.float64
    total = torch.zeros(3, dtype=dtype, device=gradient.device)
    for chunk in gradient.detach().flatten().split(CHUNK_NUMEL):
        if chunk.numel() == 0:  # an empty tensor still splits into one empty chunk
            continue
        values = chunk.to(dtype)
        mean = values.mean()
        count = torch.full_like(mean, values.numel())
        piece = torch.stack([count, mean, (values - mean).square_().sum()])
        total = combine_moments(total, piece)
    return total


def combine_moments(first: Tensor, second: Tensor) -> Tensor:
    """
    `[..., 3]` rows of count, mean and sum of squared deviations of two pieces, as rows of the whole (Chan et al.).

    A piece without elements changes nothing.
    """
    count = first[..., 0] + second[..., 0]
    share = second[..., 0] / count.clamp(min=1)
    shift = second[..., 1] - first[..., 1]
    mean = first[..., 1] + shift * share
    deviations = first[..., 2] + second[..., 2] + shift.square() * (first[..., 0] * share)
    return torch.stack([count, mean, deviations], dim=-1)


def _combine_over_mesh(table: Tensor, gradients: Sequence[Tensor], mesh: Any) -> Tensor:
    """Rows of the whole tensors from those of the shards; a dimension over which one is replicated adds nothing."""
    if table.device.type != mesh.device_type:  # FSDP2's CPU offload: the ranks can only talk on their devices
        table = table.to(mesh.device_type)
    for dim in range(mesh.ndim):
        # Not `is_shard()`, which is False for the strided shards of FSDP2 over tensor parallelism.
        sharded = [not gradient.placements[dim].is_replicate() for gradient in gradients]  # type: ignore[attr-defined]
        if not any(sharded):
            continue
        pieces = [torch.empty_like(table) for _ in range(mesh.size(dim))]
        torch.distributed.all_gather(pieces, table.contiguous(), group=mesh.get_group(dim))
        whole = pieces[0]
        for piece in pieces[1:]:
            whole = combine_moments(whole, piece)
        table = torch.where(torch.tensor(sharded, device=table.device).unsqueeze(-1), whole, table)
    return table
