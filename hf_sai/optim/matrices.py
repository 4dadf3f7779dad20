"""What SWAN does with matrices of one shape: they are batched, whitened by one call, and move together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rounding import Rounding
from .routing import Layout
from .sharding import sharding_of
from .tensors import is_sharded, local
from .whitening import IN_DTYPE, SMALL_SIDE, factors_to, in_range, normalized, whitened


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
        size (`torch.Tensor`): `[k]`: how large their gradients are, as `whitening.sizes` gives it.
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

    def flags(self, ndim: int) -> Tensor | None:
        """`finite`, to be laid over a stack of tensors of `ndim` dimensions."""
        return None if self.finite is None else self.finite.view(-1, *[1] * ndim)

    def stack(self) -> Tensor:
        """`[k, *local shape]`: what is whitened, zeros in place of what is not finite."""
        pieces = [local(matrix.source) for matrix in self.matrices]
        stack = pieces[0].unsqueeze(0) if len(pieces) == 1 else torch.stack(pieces)
        good = self.flags(stack.ndim - 1)
        return stack if good is None else torch.where(good, stack, 0.0)


def batches_of(matrices: Iterable[Matrix]) -> list[list[Matrix]]:
    """Batches of equal key, within the bound on extra memory; sharded ones larger by the ranks that share them."""
    by_key: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        by_key.setdefault(matrix.key, []).append(matrix)
    return [batch for same in by_key.values() for batch in _chunks(same)]


def _chunks(matrices: list[Matrix]) -> Iterator[list[Matrix]]:
    param = matrices[0].param
    bound = min(batch_bytes(matrix) for matrix in matrices)
    ranks = sharding_of(param).ranks if is_sharded(param) else 1
    size = max(1, bound // max(1, matrices[0].extra_bytes)) * ranks
    for start in range(0, len(matrices), size):
        yield matrices[start : start + size]


def batch_bytes(matrix: Matrix) -> int:
    """The bound on the extra memory of whitening."""
    default = CPU_BATCH_BYTES if matrix.param.device.type == "cpu" else ACCELERATOR_BATCH_BYTES
    return int(matrix.group["max_batch_bytes"] or default)


def whiten(batch: Batch) -> tuple[Tensor, Tensor]:
    """
    Update directions of a batch.

    Returns:
        `(torch.Tensor, torch.Tensor)`: `[k, *shape]` of `update_dtype`, and `[k]`, float32 or float64: what these have
            to be multiplied by to have RMS 1 (where all rows have deviation).
    """
    first, done = batch.matrices[0], 0
    targets: list[Tensor] = []
    for part in parts_of(batch):
        flat = first.layout.matrices(in_range(part.stack(), part.size))
        normed, target = normalized(flat, _resolution(first))
        if not targets:
            x = _empty_like(normed, len(flat) // len(part.matrices) * len(batch.matrices), first.update_dtype)
        x[done : done + len(flat)] = normed  # rounds
        done += len(flat)
        targets.append(target)
    return _directions(x, torch.cat(targets), first, first.param.shape)


def parts_of(batch: Batch) -> list[Batch]:
    """What goes over memory together: on the CPU one matrix, as fits its cache; elsewhere all, in one launch."""
    return batch.one_by_one() if batch.size.device.type == "cpu" else [batch]


def _empty_like(flat: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`[count, m, n]`, each in memory as in `flat`."""
    if flat.mT.is_contiguous() and not flat.is_contiguous():
        return flat.new_empty(count, flat.shape[-1], flat.shape[-2], dtype=dtype).mT
    return flat.new_empty(count, *flat.shape[-2:], dtype=dtype)


def directions(stack: Tensor, like: Matrix) -> tuple[Tensor, Tensor]:
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


def whitened_directions(stack: Tensor, like: Matrix) -> tuple[Tensor, Tensor]:
    """As [`whiten`], of matrices that GradNorm has seen."""
    flat = like.layout.matrices(stack)
    wide = torch.promote_types(flat.dtype, torch.float32)
    target = torch.linalg.vector_norm(flat, dim=(-2, -1), dtype=wide)
    return _directions(flat, target, like, stack.shape[1:])


def _directions(normed: Tensor, target: Tensor, like: Matrix, shape: torch.Size) -> tuple[Tensor, Tensor]:
    group = like.group
    found = whitened(normed, group["whitening"], group["ns_steps"], group["ns_beta"])
    factors = factors_to(found, -target if group["maximize"] else target)
    updates = like.layout.tensors(found, shape)
    if len(updates) < len(found):  # several matrices in one tensor, each with its own
        found.mul_(factors.view(-1, 1, 1))
        updates, factors = like.layout.tensors(found, shape), torch.ones_like(factors[: len(updates)])
    return updates, factors


def _resolution(matrix: Matrix) -> float:
    return torch.finfo(matrix.source.dtype).eps


def move(batch: Batch, updates: Sequence[Tensor], factors: Tensor) -> None:
    """
    `W (1 - lr * weight_decay) - lr * scale * dW` in float32, rounded once; no decay without a finite gradient.

    Args:
        batch (`Batch`): Whose parameters move.
        updates (sequence of `torch.Tensor`): One for each, zeros where the gradient is not finite.
        factors (`torch.Tensor`): `[k]`: what these are multiplied by.
    """
    start = 0
    for end in range(1, len(updates) + 1):  # neighbours of one group go together
        if end == len(updates) or batch.matrices[end].group is not batch.matrices[start].group:
            finite = None if batch.finite is None else batch.finite[start:end]
            _move(batch.matrices[start:end], updates[start:end], factors[start:end], finite)
            start = end


def _move(matrices: list[Matrix], updates: Sequence[Tensor], factors: Tensor, finite: Tensor | None) -> None:
    """Of one group."""
    if finite is not None and finite.device.type == "cpu":  # known: the others move as if it were all there is
        good = finite.nonzero().flatten().tolist()
        if not good:
            return
        matrices, updates, factors = [matrices[i] for i in good], [updates[i] for i in good], factors[finite]
        finite = None
    group = matrices[0].group
    lr = float(group["lr"])
    decay, rate = lr * group["weight_decay"], -lr * group["scale"]
    params = [local(matrix.param) for matrix in matrices]
    dtype = params[0].dtype
    if dtype == torch.promote_types(dtype, torch.float32) and (finite is None or not decay):
        if decay:
            torch._foreach_mul_(params, 1.0 - decay)
        if factors.device.type == "cpu":  # numbers there: one pass, and no copy
            for param, update, factor in zip(params, updates, factors.tolist(), strict=True):
                param.add_(update, alpha=rate * factor)
        else:
            torch._foreach_add_(params, list(_scaled(updates, factors).unbind(0)), alpha=rate)
        return
    wide = torch.stack(params).to(torch.promote_types(dtype, torch.float32))
    if decay:
        kept = 1.0 if finite is None else finite.view(-1, *[1] * (wide.ndim - 1)).to(wide.dtype)
        wide.mul_(1.0 - decay * kept)
    wide.add_(_scaled(updates, factors), alpha=rate)
    rounding = matrices[0].rounding
    if rounding is not None:
        rounding.before(wide, dtype)
    torch._foreach_copy_(params, list(wide.unbind(0)))


def _scaled(updates: Sequence[Tensor], factors: Tensor) -> Tensor:
    """`[k, *shape]` in float32 or float64."""
    stack = torch.stack(list(updates))
    return stack * factors.view(-1, *[1] * (stack.ndim - 1))
