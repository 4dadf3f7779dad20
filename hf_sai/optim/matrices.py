"""What SWAN does with matrices of one shape: they are batched, whitened by one call, and move together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .finite import is_known_at_once
from .rounding import Rounding
from .routing import Layout
from .sharding import sharding_of
from .tensors import is_sharded, local
from .whitening import (
    IN_DTYPE,
    PIECE_NUMEL,
    SMALL_SIDE,
    factors_to,
    fits,
    in_range,
    is_transposed,
    normalize_into,
    normalized,
    whitened,
)


WHITENING_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Bytes that whitening needs per element of a batch, copies and products included: measured, see tests/test_swan.py.
BYTES_PER_ELEMENT, LEAN_BYTES_PER_ELEMENT = 32, 16  # with products in float32, and in bfloat16
# On the CPU a batch stays near the caches: larger ones cost page faults.
CPU_BATCH_BYTES, ACCELERATOR_BATCH_BYTES = 2**24, 2**30


@dataclass
class Matrix:
    """A tensor to whiten in this step; `source` is its gradient, or the running mean of it."""

    group: dict[str, Any]
    name: str
    param: Tensor
    source: Tensor
    layout: Layout
    rounding: Rounding | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Tensors with the same key can be stacked and whitened by one call."""
        place = sharding_of(self.param).key if is_sharded(self.param) else ()
        names = ("whitening", "ns_steps", "ns_beta", "whitening_dtype", "maximize")
        options = [self.group[name] for name in names]
        options.append(bool(self.group["momentum"]))
        return (tuple(self.param.shape), self.layout, self.param.device, self.source.dtype, place, *options)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(count, rows, columns)` of the matrices in the tensor."""
        return self.layout.shape(self.param.shape)

    @property
    def has_several(self) -> bool:
        """Whether the tensor holds several matrices, each with its own norm."""
        return self.shape[0] > 1

    @property
    def update_dtype(self) -> torch.dtype:
        """What its whitening multiplies in, and its update has."""
        group = self.group
        if group["whitening"] in IN_DTYPE and min(self.shape[1:]) > SMALL_SIDE:
            return WHITENING_DTYPES[group["whitening_dtype"]]
        return torch.promote_types(self.source.dtype, torch.float32)

    @property
    def extra_bytes(self) -> int:
        """What whitening it takes for a while."""
        lean = self.update_dtype == torch.bfloat16
        return (LEAN_BYTES_PER_ELEMENT if lean else BYTES_PER_ELEMENT) * self.param.numel()


@dataclass
class Batch:
    """
    Matrices with the same key.

    Args:
        matrices (`list[Matrix]`): They.
        size (`torch.Tensor`): `[k]`: how large their gradients are, as `whitening.sizes` gives it; on accelerators the
            power of two below it, which they are divided by.
        finite (`torch.Tensor`, *optional*): `[k]`: whose gradient is finite; `None` if all are.
    """

    matrices: list[Matrix]
    size: Tensor
    finite: Tensor | None = None

    def one_by_one(self) -> list[Batch]:
        """As batches of one matrix each."""
        return [
            Batch([matrix], self.size[i : i + 1], None if self.finite is None else self.finite[i : i + 1])
            for i, matrix in enumerate(self.matrices)
        ]

    def stack(self) -> Tensor:
        """`[k, *local shape]`: what is whitened, zeros in place of what is not finite."""
        pieces = [local(matrix.source) for matrix in self.matrices]
        stack = torch.stack(pieces)
        if self.finite is not None:
            stack.masked_fill_(self.finite.logical_not().view(-1, *[1] * (stack.ndim - 1)), 0.0)
        return stack


def batches_of(matrices: Iterable[Matrix]) -> list[list[Matrix]]:
    """Batches of equal key, within the bound on extra memory; sharded ones larger by the ranks that share them."""
    by_key: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        by_key.setdefault(matrix.key, []).append(matrix)
    return [batch for same in by_key.values() for batch in _chunks(same)]


def _chunks(matrices: list[Matrix]) -> Iterator[list[Matrix]]:
    param = matrices[0].param
    bound = min(batch_bytes(matrix.group, matrix.param.device) for matrix in matrices)
    ranks = sharding_of(param).ranks if is_sharded(param) else 1
    size = max(1, bound // max(1, matrices[0].extra_bytes)) * ranks
    for start in range(0, len(matrices), size):
        yield matrices[start : start + size]


def batch_bytes(group: dict[str, Any], device: torch.device) -> int:
    """The bound on the extra memory of whitening."""
    default = CPU_BATCH_BYTES if device.type == "cpu" else ACCELERATOR_BATCH_BYTES
    return int(group["max_batch_bytes"] or default)


def whiten(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """
    Update directions of a batch.

    Returns:
        `(torch.Tensor, torch.Tensor or None)`: `[k, *shape]` of `update_dtype`, and `[k]`, float32 or float64: the
            norms that these have to be given to have RMS 1 (where all rows have deviation); `None` if they have them.
    """
    first = batch.matrices[0]
    if not is_known_at_once(batch.size.device):
        stack = batch.stack()
        return directions(stack / batch.size.view(-1, *[1] * (stack.ndim - 1)), first)
    tensors = [local(matrix.source) for matrix in batch.matrices]
    for index, size in enumerate(batch.size.tolist()):
        if not math.isfinite(size):
            tensors[index] = torch.zeros_like(tensors[index])
        elif not fits(size, tensors[index].numel()):
            tensors[index] = in_range(tensors[index].unsqueeze(0), batch.size[index : index + 1])[0]
    flats = [first.layout.matrices(tensor.unsqueeze(0)) for tensor in tensors]
    x = _empty_like(flats[0], sum(map(len, flats)), first.update_dtype)
    target = normalize_into(x, [matrix for flat in flats for matrix in flat.unbind(0)], _resolution(first))
    return _directions(x, target, first, first.param.shape)


def _empty_like(flat: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`[count, m, n]`, each in memory as in `flat`."""
    if is_transposed(flat):
        return flat.new_empty(count, flat.shape[-1], flat.shape[-2], dtype=dtype).mT
    return flat.new_empty(count, *flat.shape[-2:], dtype=dtype)


def directions(stack: Tensor, like: Matrix) -> tuple[Tensor, Tensor | None]:
    """As [`whiten`], of gradients that are in range: `[k, *shape]`, float32 or float64."""
    normed, target = normalized(like.layout.matrices(stack), _resolution(like), like.update_dtype)
    return _directions(normed, target, like, stack.shape[1:])


def normalized_pieces(stack: Tensor, like: Matrix) -> Tensor:
    """GradNorm of pieces that hold whole rows."""
    layout = dataclasses.replace(like.layout, parts=1)
    if stack.numel() == 0:
        return stack.to(like.update_dtype)
    normed, _ = normalized(layout.matrices(stack), _resolution(like), like.update_dtype)
    return layout.tensors(normed, stack.shape[1:])


def whitened_directions(stack: Tensor, like: Matrix) -> tuple[Tensor, Tensor | None]:
    """As [`whiten`], of matrices that GradNorm has seen."""
    flat = like.layout.matrices(stack)
    wide = torch.promote_types(flat.dtype, torch.float32)
    target = torch.linalg.vector_norm(flat, dim=(-2, -1), dtype=wide)
    return _directions(flat, target, like, stack.shape[1:])


def _directions(normed: Tensor, target: Tensor, like: Matrix, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    group = like.group
    found = whitened(normed, group["whitening"], group["ns_steps"], group["ns_beta"])
    target = -target if group["maximize"] else target
    if like.has_several:
        return like.layout.tensors(scaled(found, target), shape), None
    return like.layout.tensors(found, shape), target


def scaled(updates: Tensor, norms: Tensor | None) -> Tensor:
    """Updates `[k, ...]` of given norms `[k]`; written. `None`: as they are."""
    return updates if norms is None else updates.mul_(factors_to(updates, norms).view(-1, *[1] * (updates.ndim - 1)))


def _resolution(matrix: Matrix) -> float:
    return torch.finfo(matrix.source.dtype).eps


def move(batch: Batch, updates: Tensor, norms: Tensor | None) -> None:
    """
    `W (1 - lr * weight_decay) - lr * scale * dW` in float32, rounded once; no decay without a finite gradient.

    Args:
        batch (`Batch`): Whose parameters move.
        updates (`torch.Tensor`): `[k, *shape]`, zeros where the gradient is not finite. Not written.
        norms (`torch.Tensor`, *optional*): `[k]`: what these are scaled to.
    """
    start, count = 0, len(batch.matrices)
    for end in range(1, count + 1):  # neighbours of one group go together
        if end == count or batch.matrices[end].group is not batch.matrices[start].group:
            of_group = slice(start, end)
            given = None if norms is None else norms[of_group]
            if is_known_at_once(batch.size.device):
                _move_one_by_one(batch, of_group, updates[of_group], given)
            else:
                finite = None if batch.finite is None else batch.finite[of_group]
                _move_together(batch.matrices[of_group], updates[of_group], given, finite)
            start = end


def _move_together(matrices: list[Matrix], updates: Tensor, norms: Tensor | None, finite: Tensor | None) -> None:
    """Of one group, in few calls; reads nothing from the device, so that they can be captured in a graph."""
    group = matrices[0].group
    lr, decays = group["lr"], bool(group["weight_decay"])
    decay, by_matrix = lr * group["weight_decay"], (-1, *[1] * (updates.ndim - 1))
    params = [local(matrix.param) for matrix in matrices]
    wide = torch.promote_types(params[0].dtype, torch.float32)
    factors = -lr * group["scale"]
    if norms is None:
        updates = updates.to(wide)
    else:
        factors = factors_to(updates, norms).mul_(factors).view(by_matrix).to(wide)
    if params[0].dtype == wide and (finite is None or not decays):
        if decays:
            torch._foreach_mul_(params, 1.0 - decay)
        torch._foreach_add_(params, list((updates * factors).unbind(0)))
        return
    values = torch.stack(params)
    if decays:
        kept = 1.0 if finite is None else finite.view(by_matrix).to(wide)
        values = values.to(wide).mul_(1.0 - decay * kept)
    values = values.to(wide).add_(updates * factors) if norms is None else torch.addcmul(values, updates, factors)
    if matrices[0].rounding is not None:
        matrices[0].rounding.before(values, params[0].dtype)
    torch._foreach_copy_(params, list(values.unbind(0)))


def _move_one_by_one(batch: Batch, of_group: slice, updates: Tensor, norms: Tensor | None) -> None:
    """Of one group on the CPU, by pieces that its cache holds."""
    matrices = batch.matrices[of_group]
    group, flags = matrices[0].group, [True] * len(matrices)
    if batch.finite is not None:
        flags = batch.finite[of_group].tolist()
    lr = float(group["lr"])
    decay, rate, targets = lr * group["weight_decay"], -lr * group["scale"], [] if norms is None else norms.tolist()
    for index, (matrix, update, finite) in enumerate(zip(matrices, updates, flags, strict=True)):
        if not finite:
            continue
        param = local(matrix.param)
        dtype = torch.promote_types(param.dtype, torch.float32)
        if update.numel() <= PIECE_NUMEL or not (param.is_contiguous() and update.is_contiguous()):
            pieces: Any = [(param, update.to(dtype))]
        else:
            pieces = list(zip(param.view(-1).split(PIECE_NUMEL), update.view(-1).split(PIECE_NUMEL), strict=True))
        alpha = rate
        if norms is not None:
            squares = sum(torch.linalg.vector_norm(move.to(dtype)).item() ** 2 for _, move in pieces)
            alpha *= targets[index] / (math.sqrt(squares) or 1.0)
        for place, move in pieces:
            values = place.to(dtype)
            if decay:
                values.mul_(1.0 - decay)
            values.add_(move.to(dtype), alpha=alpha)
            if values is not place:
                if matrix.rounding is not None:
                    matrix.rounding.before(values, place.dtype)
                place.copy_(values)
