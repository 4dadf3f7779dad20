"""
The work of a step shared over the ranks: each matrix is whitened once.

Under DDP, where all ranks hold equal gradients, each whitens its share and the updates are gathered. Every rank takes
the gathered ones, its own among them, so that weights that were equal stay equal to the bit. Under FSDP2 gradients are
cut: pieces are exchanged for whole matrices, and the updates go back. In both what is sent has the dtype of the
products (bfloat16 by default, and no digit is lost by it: updates have it anyway), and the next batch is worked on
while the last one is under way.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .matrices import (
    Batch,
    Matrix,
    batches_of,
    directions,
    move,
    normalized_pieces,
    scaled,
    whiten,
    whitened_directions,
)
from .sharding import Sharding, moved, sharding_of
from .whitening import in_range, sizes


# Of what one exchange gathers: small enough that the next round is whitened meanwhile.
CPU_ROUND_BYTES, ACCELERATOR_ROUND_BYTES = 2**23, 2**27


def ranks() -> int:
    """Processes of the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_out(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """
    Which rank whitens which: the most expensive first, each to the rank that has least to do (within 4/3 of the best).

    Args:
        costs (sequence of `float`): Of whitening each matrix, in any unit.
        ranks (`int`): How many share them.

    Returns:
        `list[list[int]]`: For each rank its matrices in their order; the same on every rank.
    """
    loads, shares = [0.0] * ranks, [[] for _ in range(ranks)]  # type: ignore[var-annotated]
    for index in sorted(range(len(costs)), key=lambda each: (-costs[each], each)):
        rank = min(range(ranks), key=lambda each: (loads[each], each))
        loads[rank] += costs[index]
        shares[rank].append(index)
    return [sorted(share) for share in shares]


def rounds_of(sizes_of: Sequence[int], shares: Sequence[Sequence[int]], bound: int) -> list[list[list[int]]]:
    """
    The shares cut into rounds, one exchange each.

    Args:
        sizes_of (sequence of `int`): Bytes of each update.
        shares (sequence of sequences of `int`): As [`share_out`] gives them.
        bound (`int`): About so many of one rank in a round, where one matrix is not more.

    Returns:
        `list[list[list[int]]]`: For each round, for each rank, its matrices.
    """
    totals = [sum(sizes_of[index] for index in share) for share in shares]
    count = max(1, -(-max(totals) // max(1, bound)))
    rounds: list[list[list[int]]] = [[[] for _ in shares] for _ in range(count)]
    for rank, share in enumerate(shares):
        done = 0
        for index in share:
            # By the middle of the matrix, so that all ranks pass the same share of theirs in a round.
            middle = done + sizes_of[index] / 2
            rounds[min(count - 1, int(middle * count / max(1, totals[rank])))][rank].append(index)
            done += sizes_of[index]
    return [each for each in rounds if any(each)]


def all_gather(gathered: Tensor, mine: Tensor, async_op: bool = False) -> Any:
    """torch's, under its newer name where it has that: the older one warns then."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(gathered, mine, async_op=async_op)


class Exchange:
    """
    One round under way: this rank's updates have been sent, those of all arrive. As bytes, which every backend sends.

    Args:
        found (sequence of pairs of `torch.Tensor`): Updates of this rank's batches, and their norms or `None`.
        count (`int`): The most matrices that a rank has in this round.
        size (`int`): The most bytes of updates; what a rank has less is padding.
        device (`torch.device`): Where.
    """

    def __init__(
        self, found: Sequence[tuple[Tensor, Tensor | None]], count: int, size: int, device: torch.device
    ) -> None:
        self.head = _aligned(4 * count)
        self.size = self.head + size
        mine = torch.zeros(self.size, dtype=torch.uint8, device=device)
        norms, start, end = mine[: self.head].view(torch.float32), 0, self.head
        for updates, each in found:
            if each is not None:
                norms[start : start + len(updates)] = each
            start += len(updates)
            sent = updates.reshape(-1).view(torch.uint8)
            mine[end : end + len(sent)] = sent
            end += _aligned(len(sent))
        self.gathered = mine.new_empty(ranks() * self.size)
        self.work = all_gather(self.gathered, mine, async_op=True)

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """Norms, and bytes of updates, of a rank; waits for them."""
        self.work.wait()
        part = self.gathered[rank * self.size : (rank + 1) * self.size]
        return part[: self.head].view(torch.float32), part[self.head :]


def _aligned(size: int) -> int:
    """The next multiple of 8, so that what follows can be read as any dtype."""
    return -(-size // 8) * 8


def whiten_shared(work: Sequence[Batch]) -> None:
    """
    Whitens this rank's share of the matrices, gathers the updates of all, and moves the parameters.

    Args:
        work (sequence of `Batch`): All matrices, the same on every rank, on one device.
    """
    singles = [single for batch in work for single in batch.one_by_one()]
    rank, device = dist.get_rank(), work[0].size.device
    of_updates = [_aligned(each.param.numel() * each.update_dtype.itemsize) for each in _matrices(singles)]
    bound = (CPU_ROUND_BYTES if device.type == "cpu" else ACCELERATOR_ROUND_BYTES) // ranks()
    shares = share_out([cost_of(each) for each in _matrices(singles)], ranks())
    under_way: list[tuple[list[list[int]], Exchange]] = []
    for shared in rounds_of(of_updates, shares, bound):
        found = [whiten(batch) for batch in together([singles[index] for index in shared[rank]])]
        size = max(sum(of_updates[index] for index in share) for share in shared)
        under_way.append((shared, Exchange(found, max(map(len, shared)), size, device)))
        if len(under_way) > 1:  # that one has arrived while this one was whitened
            _move_all(singles, *under_way.pop(0))
    for shared, exchange in under_way:
        _move_all(singles, shared, exchange)


def _move_all(singles: list[Batch], shared: list[list[int]], exchange: Exchange) -> None:
    """Moves the parameters of a round, of every rank's share."""
    for rank, share in enumerate(shared):
        norms, sent = exchange.of_rank(rank)
        for batch in together([singles[index] for index in share]):
            first, count = batch.matrices[0], len(batch.matrices)
            size = count * first.param.numel() * first.update_dtype.itemsize
            updates = sent[:size].view(first.update_dtype).view(count, *first.param.shape)
            move(batch, updates, None if first.has_several else norms[:count])
            sent, norms = sent[_aligned(size) :], norms[count:]


def _matrices(singles: Sequence[Batch]) -> list[Matrix]:
    return [single.matrices[0] for single in singles]


def together(singles: list[Batch]) -> list[Batch]:
    """Batches of one matrix each, as batches of equal keys within the bound on memory."""
    of = {id(single.matrices[0]): single for single in singles}
    found = []
    for matrices in batches_of([single.matrices[0] for single in singles]):
        same = [of[id(matrix)] for matrix in matrices]
        flags = [single.finite for single in same if single.finite is not None]
        found.append(Batch(matrices, torch.cat([each.size for each in same]), torch.cat(flags) if flags else None))
    return found


def cost_of(matrix: Matrix) -> float:
    """Of whitening: the products of the smaller side, `m^2 n` for each matrix in the tensor."""
    count, rows, columns = matrix.shape
    return float(count) * min(rows, columns) ** 2 * max(rows, columns)


def whiten_sharded(work: Sequence[Batch]) -> None:
    """
    Exchanges pieces for whole matrices, whitens this rank's share, sends the updates back, and moves the parameters.

    Args:
        work (sequence of `Batch`): All matrices, the same on every rank, sharded over one mesh.
    """
    arriving: tuple[Batch, Sharding, Tensor] | None = None
    returning: tuple[Batch, Tensor] | None = None
    for batch in [*work, None]:
        started = None
        if batch is not None:
            sharding = sharding_of(batch.matrices[0].param)
            started = (batch, sharding, sharding.gather(_pieces(batch, sharding)))
        sent = None
        if arriving is not None:
            whole, sharding, gathered = arriving
            updates = _whole_updates(whole, sharding, gathered)
            sent = (whole, sharding.scatter(updates, len(whole.matrices)))
        if returning is not None:
            _move_pieces(*returning)
        arriving, returning = started, sent
    if returning is not None:
        _move_pieces(*returning)


def _pieces(batch: Batch, sharding: Sharding) -> Tensor:
    """What is sent: rows that GradNorm has seen, where this rank has whole ones, or else gradients as they are."""
    stack = batch.stack()
    if not _has_whole_rows(batch.matrices[0], sharding):
        return stack
    return normalized_pieces(in_range(stack, batch.size), batch.matrices[0])


def _whole_updates(batch: Batch, sharding: Sharding, gathered: Tensor) -> Tensor:
    """This rank's share of the updates."""
    first = batch.matrices[0]
    if not len(gathered):
        return gathered.to(first.update_dtype)
    if _has_whole_rows(first, sharding):
        return scaled(*whitened_directions(gathered, first))
    return scaled(*directions(in_range(gathered, sizes(list(gathered.unbind(0)))), first))


def _move_pieces(batch: Batch, updates: Tensor) -> None:
    """Moves this rank's pieces."""
    move(batch, moved(updates, batch.size.device), None)


def _has_whole_rows(matrix: Matrix, sharding: Sharding) -> bool:
    """Whether the pieces hold whole rows: no dimension of the columns is cut."""
    last = matrix.param.ndim - 1
    if matrix.layout.transposed:
        columns = range(last - 1, last)
    else:
        columns = range(last, last + 1) if matrix.layout.batched else range(1, last + 1)
    return not sharding.cuts(columns)


def differ(names: Sequence[str], size: Tensor) -> bool:
    """
    Whether the ranks are out of step: their gradients are of other tensors or of another size. One collective; waits.

    Args:
        names (sequence of `str`): Of the tensors that have a gradient.
        size (`torch.Tensor`): `[len(names)]`: how large each is.
    """
    kept = torch.nan_to_num(size.double(), nan=0.0, posinf=0.0, neginf=0.0)
    names_sum = float(zlib.crc32("\n".join(names).encode()))
    mine = torch.stack([torch.full_like(kept.sum(), names_sum), kept.sum(), (kept.sqrt() * _weights(kept)).sum()])
    all_of = mine.new_empty(dist.get_world_size() * 3)
    all_gather(all_of, mine)
    rows = all_of.view(-1, 3)
    # Clipping may round the same gradients to another last digit on each machine.
    return not torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-3, atol=0.0)


def _weights(values: Tensor) -> Tensor:
    """Others for every place, so that two tensors that change places are noticed."""
    return torch.linspace(1.0, 2.0, values.numel(), dtype=values.dtype, device=values.device)
