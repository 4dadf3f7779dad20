"""
Whole matrices from sharded ones and back, each rank getting its share, through the public DTensor API.

A stack of `k` tensors that are sharded alike is itself a tensor of one dimension more. Redistributed so that the stack
is sharded instead, each rank holds some of the matrices whole; redistributed back, it holds its pieces of all. Both
are started and not waited for: the first use of what they give waits. Ranks talk on the device of their mesh: pieces
that FSDP2's CPU offload keeps elsewhere go there, and what comes back goes where the pieces are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class ShardingError(RuntimeError, ValueError):
    """A DTensor is laid out as SWAN can't gather it."""


@dataclass(frozen=True)
class Sharding:
    """
    How a DTensor lies over the ranks.

    Args:
        mesh (`DeviceMesh`): The ranks.
        placements (`tuple`): One per dimension of the mesh, `Shard` or `Replicate`.
        shape (`torch.Size`): Of the whole tensor.
        stride (`tuple[int, ...]`): Of the whole tensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for tensors that can be stacked."""
        return (self.mesh, self.placements, self.stride)

    @property
    def ranks(self) -> int:
        """How many share the work."""
        return int(self.mesh.size())

    def gather(self, pieces: Tensor) -> Tensor:
        """
        This rank's share of the whole tensors.

        Args:
            pieces (`torch.Tensor`): `[k, *local shape]`: this rank's piece of each tensor.

        Returns:
            `torch.Tensor`: `[this rank's part of k, *shape]`; the part may be empty.
        """
        stacked = self._stacked(moved(pieces, self.mesh.device_type), len(pieces), self._by_piece())
        return stacked.redistribute(placements=self._by_tensor(), async_op=True).to_local()

    def scatter(self, whole: Tensor, count: int) -> Tensor:
        """
        Undoes `gather`, on the device of the mesh.

        Args:
            whole (`torch.Tensor`): `[this rank's part of k, *shape]`.
            count (`int`): `k`.
        """
        stacked = self._stacked(whole, count, self._by_tensor())
        return stacked.redistribute(placements=self._by_piece(), async_op=True).to_local()

    def cuts(self, dims: range) -> bool:
        """Whether one of these dimensions is sharded."""
        return any(each.is_shard() and each.dim in dims for each in self.placements)

    def _by_piece(self) -> list[Any]:
        from torch.distributed.tensor import Shard

        return [Shard(each.dim + 1) if each.is_shard() else each for each in self.placements]

    def _by_tensor(self) -> list[Any]:
        from torch.distributed.tensor import Shard

        return [Shard(0)] * self.mesh.ndim

    def _stacked(self, values: Tensor, count: int, placements: list[Any]) -> Any:
        from torch.distributed.tensor import DTensor

        shape = torch.Size([count, *self.shape])
        stride = (self.shape.numel(), *torch.empty(self.shape, device="meta").stride())
        return DTensor.from_local(
            values.contiguous(), self.mesh, placements, run_check=False, shape=shape, stride=stride
        )


def moved(values: Tensor, device: torch.device | str) -> Tensor:
    """On another kind of device; the same where it is there."""
    return values if values.device.type == torch.device(device).type else values.to(device)


def sharding_of(param: Tensor) -> Sharding:
    """
    The sharding of a DTensor.

    Raises:
        `ShardingError`: It is laid out in another way than in equal pieces or copies.
    """
    from torch.distributed.tensor import Replicate, Shard

    placements = tuple(param.placements)  # type: ignore[attr-defined]
    if not all(type(placement) in (Shard, Replicate) for placement in placements):
        raise ShardingError(
            f"SWAN whitens whole matrices and can gather DTensors that are sharded or replicated, but one lies as "
            f"{placements}; use FSDP2 without tensor parallelism for it"
        )
    return Sharding(param.device_mesh, placements, param.shape, param.stride())  # type: ignore[attr-defined]
