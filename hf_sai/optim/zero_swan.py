"""
Whole matrices out of the ranks' pieces under DeepSpeed ZeRO, and updates back.

The matrices of one shape are shared out over the ranks. One all_to_all brings each rank the pieces of its matrices, it
whitens them, and one all_to_all takes the pieces of the updates back to where the pieces of the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .finite import flags_of, over_ranks
from .routing import ADAM
from .tensors import gradient_of
from .zero import ZeroPieces


@dataclass
class PieceOfMatrix:
    """
    This rank's piece of a matrix to whiten in this step.

    Args:
        group (`dict`): The inner group, with SWAN's options.
        route (`str`): How the tensor is made of matrices.
        shape (`tuple[int, ...]`): Of the whole tensor.
        view (`torch.Tensor`): Of the weights; written.
        source (`torch.Tensor`): Gradient, or momentum buffer; as `view`.
        places (`list[tuple[int, int]]`): `(offset, numel)` of the pieces on all ranks.
        finite (`torch.Tensor`): Whether the whole gradient is; without dimensions.
    """

    group: dict[str, Any]
    route: str
    shape: tuple[int, ...]
    view: Tensor
    source: Tensor
    places: list[tuple[int, int]]
    finite: Tensor

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for those that are whitened together."""
        names = sorted(name for name in self.group if name.startswith(("whitening", "ns_")))
        return (self.shape, self.route, self.group["maximize"], *[(name, self.group[name]) for name in names])


# (group, route, stack of whole sources) -> updates of RMS 1.
Whiten = Callable[[dict[str, Any], str, Tensor], Tensor]
Place = tuple[int, int, Tensor]


def move_pieces(
    optimizer: Any, places: list[Place], whiten: Whiten, elements: Callable[[dict[str, Any], torch.device], int]
) -> list[Place]:
    """
    Updates the matrices of which ZeRO has pieces.

    Args:
        optimizer (`SWAN`): The inner one.
        places (`list`): Group index, index in the group, piece; the same tensors on all ranks.
        whiten (callable): Whitens whole matrices, `[k, *shape]`.
        elements (callable): Of a group and a device, how many a rank whitens at a time.

    Returns:
        `list`: The places of Adam's tensors, whose pieces are tensors like others.
    """
    pieces: ZeroPieces = optimizer._pieces
    groups = optimizer.param_groups
    to_adam = [place for place in places if groups[place[0]]["routes"][place[1]] == ADAM]
    found = [place for place in places if groups[place[0]]["routes"][place[1]] != ADAM]
    if not found:
        return to_adam
    gradients = [gradient_of(param) for _, _, param in found]
    group, device = pieces.ranks()
    flags = over_ranks(flags_of(gradients), [group], device) == 0.0
    names = [optimizer._name(group, index) for group, index, _ in found]
    optimizer._tell_of(names, flags, [optimizer.state[param] for _, _, param in found])
    matrices = []
    for (group_index, index, param), source, finite in zip(found, gradients, flags, strict=True):
        group, state = groups[group_index], optimizer.state[param]
        if group["momentum"]:
            weight = 1.0 - group["momentum"] if "momentum_buffer" in state else 1.0
            buffer = state.setdefault("momentum_buffer", torch.zeros_like(param.detach()))
            source = buffer.lerp_(torch.where(finite, source, buffer), weight)
        shape, where = optimizer.shape_of(param), pieces.where(param)
        matrices.append(PieceOfMatrix(group, group["routes"][index], shape, param.detach(), source, where, finite))
        state["step"] += 1 if finite.device.type != "cpu" else int(finite)
    bound = min(elements(matrix.group, pieces.zero.device()) for matrix in matrices)
    whiten_pieces(matrices, pieces, whiten, bound)
    return to_adam


def whiten_pieces(matrices: list[PieceOfMatrix], pieces: ZeroPieces, whiten: Whiten, bound: int) -> None:
    """
    Whitens matrices of which the ranks hold pieces, and moves the weights. All ranks call it with the same matrices.

    Args:
        matrices (`list[PieceOfMatrix]`): Empty pieces too.
        pieces (`ZeroPieces`): For the ranks.
        whiten (callable): Whitens whole matrices, `[k, *shape]`.
        bound (`int`): Elements that a rank whitens at a time, or one matrix.
    """
    ranks = dist.get_world_size(pieces.zero.process_group)
    together: dict[tuple[Any, ...], list[PieceOfMatrix]] = {}
    for matrix in matrices:
        together.setdefault(matrix.key, []).append(matrix)
    for alike in together.values():
        numel = max(1, torch.Size(alike[0].shape).numel())
        size = max(1, bound // numel) * ranks
        for start in range(0, len(alike), size):
            _whiten_batch(alike[start : start + size], pieces, whiten)


def _whiten_batch(batch: list[PieceOfMatrix], pieces: ZeroPieces, whiten: Whiten) -> None:
    group, device = pieces.zero.process_group, pieces.zero.device()
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    owned = [batch[owner::ranks] for owner in range(ranks)]
    by_owner = [matrix for matrices in owned for matrix in matrices]
    sources = [torch.where(matrix.finite, matrix.source, 0.0) for matrix in by_owner]
    mine = [sum(matrix.places[rank][1] for matrix in matrices) for matrices in owned]  # what is mine of each owner's
    theirs = [sum(matrix.places[other][1] for matrix in owned[rank]) for other in range(ranks)]
    received = _exchange(torch.cat(sources).to(device), mine, theirs, group)

    shape = batch[0].shape
    whole = torch.zeros((len(owned[rank]), *shape), dtype=received.dtype, device=device)
    cuts = list(_cuts(whole, owned[rank], ranks))
    if cuts:
        torch._foreach_copy_(cuts, list(received.split([cut.numel() for cut in cuts])))
        whole = whiten(batch[0].group, batch[0].route, whole).to(received.dtype)
    updates = torch.cat([received[:0], *_cuts(whole.contiguous(), owned[rank], ranks)])
    back = _exchange(updates, theirs, mine, group).to(batch[0].view.device)
    sizes = [matrix.places[rank][1] for matrix in by_owner]
    for matrix, update in zip(by_owner, back.split(sizes), strict=True):
        _move(matrix, update)


def _cuts(whole: Tensor, matrices: list[PieceOfMatrix], ranks: int) -> Iterator[Tensor]:
    """The pieces of whole matrices, rank after rank and matrix after matrix."""
    flat = whole.flatten(1)
    for rank in range(ranks):
        for row, matrix in zip(flat, matrices, strict=True):
            offset, numel = matrix.places[rank]
            if numel:
                yield row.narrow(0, offset, numel)


def _exchange(send: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    found = send.new_empty(sum(received))
    dist.all_to_all_single(found, send.contiguous(), received, sent, group=group)
    return found


def _move(matrix: PieceOfMatrix, update: Tensor) -> None:
    """`W (1 - lr * weight_decay) - lr * scale * dW`; no decay without a finite gradient."""
    lr = float(matrix.group["lr"])
    if matrix.group["weight_decay"]:
        matrix.view.mul_(1.0 - lr * matrix.group["weight_decay"] * matrix.finite.to(matrix.view.dtype))
    matrix.view.add_(update, alpha=-lr * matrix.group["scale"])
