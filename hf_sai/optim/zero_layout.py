"""
Which piece of which tensor DeepSpeed ZeRO keeps where, read from its own optimizer and checked by value.

Under ZeRO 1, 2 and 3 an optimizer is handed flat float32 buffers instead of parameters: one per group and rank (with
stage 3 one per sub-group), in which pieces of the group's tensors lie one after the other. DeepSpeed has no interface
that says where. So each place is computed here, and compared with what the model itself holds there before the first
step; a layout that this module does not understand is an error. DeepSpeed is not imported: its optimizer is found in
memory by what it holds.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


# The classes whose layout is known; others (ZenFlow, SuperOffload, MiCS, ...) derive from them and are refused.
_KNOWN = {"DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"}


class ZeroLayoutError(RuntimeError, ValueError):
    """ZeRO keeps the pieces in a way that is not understood or not supported."""


@dataclass(eq=False)
class Piece:
    """
    What this rank keeps of one tensor.

    Args:
        param (`torch.nn.Parameter`): The model's own.
        group (`int`): Index of its group.
        shape (`tuple[int, ...]`): Of the whole tensor.
        start (`int`): Where the piece begins in the flat buffer.
        offset (`int`): Where it begins in the whole tensor, flattened.
        numel (`int`): Its elements; 0 where this rank keeps nothing of the tensor.
        there (`torch.Tensor`): What the model holds of it, `[numel]`, in the model's dtype.
    """

    param: Tensor
    group: int
    shape: tuple[int, ...]
    start: int
    offset: int
    numel: int
    there: Tensor

    def cut(self, flat: Tensor) -> Tensor:
        """The piece of a flat buffer: a view."""
        return flat.narrow(0, self.start, self.numel)


@dataclass(eq=False)
class Flat:
    """
    One flat buffer of this rank.

    Args:
        tensor (`torch.Tensor`): The buffer, float32, which the optimizer is handed as a parameter.
        group (`int`): Index of the group.
        pieces (`list[Piece]`): One per tensor of the group (of the sub-group), in the group's order.
    """

    tensor: Tensor
    group: int
    pieces: list[Piece] = field(default_factory=list)

    def gradient(self) -> list[Tensor]:
        """The gradient that the buffer has; none where it has none."""
        return [] if self.tensor.grad is None else [self.tensor.grad]


def _is_there(piece: Piece, flat: Tensor) -> bool:
    values = piece.cut(flat)
    return not piece.numel or torch.equal(values.to(piece.there.dtype), piece.there.to(values.device))


def find_zero(optimizer: Any) -> Zero | None:
    """
    The ZeRO that has taken over an optimizer; `None` where none has.

    ZeRO 1 and 2 leave no reference to themselves where the optimizer could follow it, so all objects are looked at,
    which takes a fraction of a second; call it once.

    Raises:
        `ZeroLayoutError`: It is of a kind that is not supported.
    """
    if "deepspeed" not in sys.modules:
        return None
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for candidate in gc.get_objects():
        if not str(type(candidate).__module__).startswith("deepspeed."):
            continue
        if getattr(candidate, "__dict__", {}).get("optimizer") is not optimizer:
            continue
        for kind in (_Zero12, _BF16, _Zero3):
            flats = getattr(candidate, kind.flats_name, None)
            if flats and all(any(param is flat for flat in flats) for param in params):
                _refuse_unknown(candidate)
                return kind(candidate)
    return None


def _refuse_unknown(owner: Any) -> None:
    """Raises [`ZeroLayoutError`] for what was never tried, or what is known to train with something else."""
    dtype = getattr(owner, "master_weights_and_grads_dtype", torch.float32)
    for mode, is_on in (
        (type(owner).__name__, type(owner).__name__ not in _KNOWN),
        ("NVMe offload", getattr(owner, "swap_optimizer", False) or getattr(owner, "params_in_nvme_and_cpu", False)),
        (
            "Twin-Flow offload (ratio below 1), which trains a share with AdamW",
            getattr(owner, "partial_offload", 1) != 1,
        ),
        ("ZenFlow", getattr(owner, "zenflow", False)),
        ("a mixture of experts of DeepSpeed's", getattr(owner, "has_moe_layers", False)),
        ("model parallelism (AutoTP, pipeline)", getattr(owner, "model_parallel_world_size", 1) > 1),
        ("ZeRO++ (zero_hpz_partition_size)", (getattr(owner, "zero_hpz_partition_size", 1) or 1) > 1),
        ("ZeRO++ (zero_quantized_gradients)", getattr(owner, "all2all_process_group", None) is not None),
        ("elastic_checkpoint", getattr(owner, "elastic_checkpoint", False)),
        ("torch_autocast with float16", getattr(owner, "torch_autocast_gradscaler", None) is not None),
        (f"master weights in {dtype}", dtype != torch.float32),
    ):
        if is_on:
            raise ZeroLayoutError(
                f"hf_sai's optimizers run under DeepSpeed ZeRO 0 to 3, but {mode} is on, with which they were never "
                "tried; switch it off in the DeepSpeed configuration, or choose another optimizer"
            )


class Zero:
    """
    DeepSpeed's optimizer, as far as it has to be known; one subclass per kind.

    Args:
        owner (`Any`): DeepSpeed's optimizer.
    """

    flats_name = ""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.flats = [Flat(tensor, self._group_of(i)) for i, tensor in enumerate(getattr(owner, self.flats_name))]
        for index, flat in enumerate(self.flats):
            flat.pieces = list(self._pieces(index, flat))

    @property
    def process_group(self) -> Any:
        """The ranks that share the tensors."""
        raise NotImplementedError

    def names(self) -> dict[Tensor, str]:
        """What the model calls its parameters."""
        return dict(getattr(self.owner, "param_names", {}))

    def pending(self, index: int) -> list[Tensor]:
        """
        The gradients of a flat buffer before DeepSpeed has unscaled and clipped them: flat tensors that follow on one
        another, in the dtype in which DeepSpeed accumulates.
        """
        raise NotImplementedError

    def unit(self) -> float:
        """What DeepSpeed is about to multiply pending gradients by in this step."""
        norm, clip = self.owner._global_grad_norm, float(self.owner.clip_grad or 0.0)
        shrink = max(1.0, (float(norm) + 1e-6) / clip) if clip > 0.0 and norm is not None else 1.0
        return 1.0 / (float(self.owner.loss_scale) * shrink)

    def check(self) -> dict[Piece, list[tuple[int, int]]]:
        """
        Compares every piece with what the model holds there. Collective, once; all ranks raise if one has to.

        Returns:
            `dict`: Of each piece's tensor, `(offset, numel)` on every rank.

        Raises:
            `ZeroLayoutError`: One differs, or the pieces of a tensor on all ranks are not the whole tensor.
        """
        pieces = [(flat.tensor.detach(), piece) for flat in self.flats for piece in flat.pieces]
        rows = [(piece.offset, piece.numel, _is_there(piece, flat)) for flat, piece in pieces]
        mine = torch.tensor(rows, device=self.device())
        everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.process_group))]
        dist.all_gather(everywhere, mine, group=self.process_group)
        places = {}
        for (_, piece), ranks in zip(pieces, torch.stack(everywhere, dim=1).tolist(), strict=True):
            end = 0
            for offset, numel in sorted((offset, numel) for offset, numel, _ in ranks if numel):
                end = end + numel if offset == end else -1
            if not all(there for _, _, there in ranks):
                raise ZeroLayoutError(self._not_understood(piece, "its values differ from the model's"))
            if end != math.prod(piece.shape):
                raise ZeroLayoutError(self._not_understood(piece, "the ranks' pieces do not make up the whole"))
            places[piece] = [(offset, numel) for offset, numel, _ in ranks]
        return places

    def device(self) -> torch.device:
        """Where collectives of the process group work: that of the model, whatever DeepSpeed has offloaded."""
        return self.flats[0].pieces[0].param.device

    def _not_understood(self, piece: Piece, why: str) -> str:
        name = self.names().get(piece.param, f"of shape {piece.shape}")
        version = getattr(sys.modules.get("deepspeed"), "__version__", "?")
        return (
            f"the pieces of {name} must lie in ZeRO's flat buffer as this version of hf_sai expects, but {why} "
            f"(DeepSpeed {version}); install a version of DeepSpeed that hf_sai names in its extra, and report this"
        )

    def _group_of(self, index: int) -> int:
        return index

    def _pieces(self, index: int, flat: Flat) -> Iterator[Piece]:
        raise NotImplementedError


class _Zero12(Zero):
    """
    Stages 1 and 2. The model's parameters are views of one flat buffer per group, so their memory tells where they lie
    in it, whatever order or padding DeepSpeed has chosen; each rank keeps an equal share of it.
    """

    flats_name, params_name, model_name = "single_partition_of_fp32_groups", "bit16_groups", "bit16_groups_flat"

    @property
    def process_group(self) -> Any:
        return self.owner.real_dp_process_group[0]

    def _pieces(self, index: int, flat: Flat) -> Iterator[Piece]:
        whole = getattr(self.owner, self.model_name)[index]
        begin = dist.get_rank(self.process_group) * flat.tensor.numel()
        end = begin + flat.tensor.numel()
        for param in getattr(self.owner, self.params_name)[index]:
            at = param.storage_offset() - whole.storage_offset()
            low, high = max(begin, at), min(end, at + param.numel())
            start, offset, numel = (low - begin, low - at, high - low) if high > low else (0, 0, 0)
            piece = Piece(param, index, tuple(param.shape), start, offset, numel, param.detach())
            if param.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or not param.is_contiguous():
                raise ZeroLayoutError(self._not_understood(piece, "the model's is no part of the flat buffer"))
            piece.there = param.detach().view(-1).narrow(0, offset, numel)
            yield piece

    def pending(self, index: int) -> list[Tensor]:
        if self.owner.cpu_offload:
            return self.flats[index].gradient()
        gradients = self.owner.averaged_gradients[index]
        together = getattr(gradients, "flat_partition", None)
        return [together.view(-1)] if together is not None else [each.reshape(-1) for each in gradients]


class _BF16(_Zero12):
    """Stage 1 with bf16 and gradients in float32, which has a class of its own, and updates all groups in one step."""

    flats_name, params_name, model_name = "fp32_groups_flat_partition", "bf16_groups", "bf16_groups_flat"

    def pending(self, index: int) -> list[Tensor]:
        return self.flats[index].gradient()

    def unit(self) -> float:
        return 1.0


class _Zero3(Zero):
    """Stage 3. Each rank keeps the same share of every tensor, one after the other."""

    flats_name = "fp32_partitioned_groups_flat"

    @property
    def process_group(self) -> Any:
        return self.owner.fp16_groups[0][0].ds_process_group

    def _group_of(self, index: int) -> int:
        return self.owner.sub_group_to_group_id[index]

    def _pieces(self, index: int, flat: Flat) -> Iterator[Piece]:
        rank, start = dist.get_rank(self.process_group), 0
        for param in self.owner.fp16_groups[index]:
            size, whole = param.partition_numel(), param.ds_numel
            numel = max(0, min(size, whole - rank * size))
            offset = rank * size if numel else 0
            there = param.ds_tensor.detach().flatten()[:numel]
            yield Piece(param, flat.group, tuple(param.ds_shape), start, offset, numel, there)
            start += size

    def pending(self, index: int) -> list[Tensor]:
        if self.owner.offload_optimizer:
            return self.flats[index].gradient()
        return [each.reshape(-1) for each in self.owner.averaged_gradients[index]]
