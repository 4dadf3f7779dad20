"""
SWAN: stateless SGD that normalises and whitens each matrix gradient, and Adam for what is no matrix.

Source: Ma, Gong, Scetbon, Meeds, "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training", arXiv
2412.13148.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam_update import AdamBatch, adam_update, new_adam_state
from .base import NamedOptimizer, check_writer
from .checks import check_flag, from_text, refuse_unknown
from .finite import is_known_at_once, over_ranks, ranks_of
from .matrices import BYTES_PER_ELEMENT, Batch, Matrix, batch_bytes, batches_of, directions, move, scaled, whiten
from .precision import undisturbed
from .rounding import Rounding
from .routing import ADAM, Route, complete_routes, layout_of
from .sharding import sharding_of
from .sharing import differ, ranks, whiten_sharded, whiten_shared
from .swan_options import FROM_TEXT, SAVED_KEYS, check_options
from .tensors import LIST_NUMEL, buffer_dtype, check_gradient, gradient_of, is_sharded, local
from .whitening import Method, as_divisors, in_range, sizes
from .zero_swan import move_pieces


logger = logging.getLogger(__name__)


class SWAN(NamedOptimizer):
    r"""
    Stateless SGD for matrices, with normalised and whitened gradients (arXiv 2412.13148); Adam for all else.

    For a weight matrix with gradient `G`, rows being output features:

        GradNorm(G)      = (G - rowmean(G)) / rowstd(G)
        GradWhitening(X) = (X X^T)^(-1/2) X
        dW               = GradWhitening(GradNorm(G)), rescaled to ||GradNorm(G)||_F: an update of RMS 1
        W                = W (1 - lr * weight_decay) - lr * scale * dW

    Nothing is kept between steps for a matrix. Embeddings, the output head and what is not a matrix are updated by
    Adam at `lr * adam_lr_ratio`, with moments in float32; so one learning rate and one scheduler drive both. Which
    tensor goes where is decided by [`hf_sai.param_groups`] from the modules; without a model, tensors of two
    dimensions or more are taken for matrices, flattened to `(first dimension, rest)`.

    Matrices of equal shape are whitened together across layers. A zero gradient gives a zero update. A tensor whose
    gradient has inf or NaN is left alone in that step, with one warning (on an accelerator in the next step, because
    reading it at once would make the device wait).

    DTensors (FSDP2) are whitened whole: each batch is exchanged so that every rank whitens its share of the matrices.
    Under DDP each rank whitens its share too, with `share_whitening`.

    A group holds, besides the options, `kind` (`"swan"`, `"adam"` or `"auto"`) and for each of its parameters `routes`
    and `reasons`. State per tensor: for Adam's `step`, `exp_avg`, `exp_avg_sq`; for a matrix `step`, a plain number,
    and with `momentum` a `momentum_buffer`.

    Args:
        params (iterable of `torch.Tensor`, of `("name", tensor)` pairs, or of group `dict`s):
            What to optimize; `hf_sai.param_groups(model, "swan")` for a model.
        lr (`float`, *optional*, defaults to 1e-3):
            Learning rate, in AdamW's terms: the one that is right for AdamW is a good start.
        whitening (`str`, *optional*, defaults to `"polar"`):
            `"polar"`, `"polar_express"`, `"newton_schulz"` and `"nsds"` (the paper's two) or `"svd"`; see
            [`hf_sai.optim.whitening.grad_whitening`], and [`hf_sai.optim.swan_preset`] for the paper's settings.
        ns_steps (`int`, *optional*): Steps of the iteration; `None` for the method's own: 3, 6, the paper's 10 and 2.
        ns_beta (`float`, *optional*): Step size of `"newton_schulz"` and `"nsds"`; `None` for 0.5 and 0.4.
        whitening_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Of the products of `"polar"`, `"polar_express"` and `"nsds"`, and of their updates: `"bfloat16"` or
            `"float32"`. The others compute in float32.
        scale (`float`, *optional*, defaults to 3.0):
            What `lr` is multiplied by for matrices.
        adam_lr_ratio (`float`, *optional*, defaults to 3.0):
            What `lr` is multiplied by for Adam's tensors.
        betas (pair of `float`, *optional*, defaults to (0.9, 0.999)): Adam's.
        eps (`float`, *optional*, defaults to 1e-8): Adam's.
        weight_decay (`float`, *optional*, defaults to 0.0):
            Decoupled: `lr * weight_decay` for all tensors of a group, without `scale` or ratio.
        momentum (`float`, *optional*, defaults to 0.0):
            In [0, 1). Whitens a running mean of the gradient, which takes a buffer per matrix. The paper has none.
        maximize (`bool`, *optional*, defaults to `False`): Ascend. `p.grad` is not written.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Rounds bf16 parameters at random, so that updates below their resolution are not lost.
        max_batch_bytes (`int`, *optional*):
            Bound on the extra memory of whitening, as long as one matrix fits into it. `None`: 16 MiB on the CPU,
            which stays near the caches, and 1 GiB elsewhere.
        share_whitening (`bool`, *optional*, defaults to `False`):
            Whether the processes of the default group share the work: each whitens its part of the matrices, and the
            updates are gathered in `whitening_dtype`. All of them must step together and hold equal gradients, as
            under DistributedDataParallel; that is checked before the first step. Trainers set it under DDP, unless
            the option is given. DTensors are shared in any case, and layer-wise updates never.

    Raises:
        `ValueError`: An option is out of its range, or a group of kind `"swan"` holds a tensor that is no matrix.
        `ShardingError`: A matrix is a DTensor that is laid out as it can't be gathered.
        `RuntimeError`: In `step()`, a gradient is sparse, or `share_whitening` is set and the ranks' gradients differ.

    Example:

    ```python
    optimizer = SWAN(hf_sai.param_groups(model, "swan", weight_decay=0.1), lr=1e-3)
    ```
    """

    _progress = ("lr", "step")
    _chosen = ("lora_whitening", "split_qkv", "target_modules")
    _per_tensor = ("routes",)
    _multiplies = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        whitening: Method = "polar",
        ns_steps: int | None = None,
        ns_beta: float | None = None,
        whitening_dtype: str = "bfloat16",
        scale: float = 3.0,
        adam_lr_ratio: float = 3.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        max_batch_bytes: int | None = None,
        share_whitening: bool = False,
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self), unknown)
        defaults = {
            "lr": lr,
            "whitening": whitening,
            "ns_steps": ns_steps,
            "ns_beta": ns_beta,
            "whitening_dtype": str(whitening_dtype).removeprefix("torch."),
            "scale": scale,
            "adam_lr_ratio": adam_lr_ratio,
            "betas": tuple(betas) if isinstance(betas, (list, tuple)) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "max_batch_bytes": max_batch_bytes,
            "kind": "auto",
            "step": 0,  # no option: what the noise of stochastic rounding is drawn by, the same on all ranks
            # What hf_sai.param_groups made the groups by. `None`: no module was asked.
            "lora_whitening": None,
            "split_qkv": False,
            "target_modules": None,
        }
        defaults = from_text(defaults, FROM_TEXT)
        check_options(defaults)
        share_whitening = from_text({"share_whitening": share_whitening}, FROM_TEXT)["share_whitening"]
        check_flag("share_whitening", share_whitening)
        self.share_whitening = share_whitening  # no option of groups: it changes no update, and the ranks may differ
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        # torch's leaves out what is no option of a group
        return {**super().__getstate__(), "share_whitening": self.share_whitening}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Adds a group, in the middle of training too.

        Args:
            param_group (`dict`): `"params"`, the options that differ from the defaults, `"kind"`, and where they are
                known `"routes"` and `"reasons"`, one per parameter.

        Raises:
            `ValueError`: An option is out of its range, or a route does not fit.
            `ShardingError`: A matrix is a DTensor that is laid out as it can't be gathered, as by FSDP2 beside tensor
                parallelism.
        """
        group = from_text(param_group, FROM_TEXT)
        check_options({**self.defaults, **group})
        shared = {"step": self.param_groups[0]["step"]} if self.param_groups else {}
        super().add_param_group({**group, "params": self._with_names(param_group["params"]), **shared})
        group = self.param_groups[-1]
        try:
            complete_routes(group)
            for param, route in zip(group["params"], group["routes"], strict=True):
                if route != ADAM and is_sharded(param):
                    sharding_of(param)  # raises where it can't be gathered
        except ValueError:
            self.param_groups.pop()  # as if it had not come
            raise

    def routes(self) -> list[Route]:
        """Where each parameter goes and why, in the order of the groups."""
        if self.per_tensor is not self:
            return self.per_tensor.routes()
        return [
            Route(
                self._name(group_index, index), self._of_model(param), group["routes"][index], group["reasons"][index]
            )
            for group_index, index, param in self._params()
            for group in [self.param_groups[group_index]]
        ]

    def whitening_bytes(self, one_at_a_time: bool = False) -> int:
        """
        A bound on what whitening needs for a while in a step, with gradients in the parameters' dtype; reads shapes.

        Args:
            one_at_a_time (`bool`, *optional*, defaults to `False`): As layer-wise updates whiten.
        """
        matrices = [
            Matrix(self.param_groups[group_index], row.name, param, param, layout_of(row.route))
            for row, (group_index, _, param) in zip(self.routes(), self._params(), strict=True)
            if row.route != ADAM
        ]
        batches = batches_of(matrices)
        return max(((1 if one_at_a_time else len(batch)) * batch[0].extra_bytes for batch in batches), default=0)

    def extra_bytes(self, one_at_a_time: bool = False) -> int:
        """The most that a step needs for a while: as `whitening_bytes`, or Adam's float32 copies of low precision."""
        to_adam = [row.param for row in self.routes() if row.route == ADAM and row.param.dtype != torch.float32]
        copies = max((2 * 4 * min(param.numel(), LIST_NUMEL) for param in to_adam), default=0)
        return max(self.whitening_bytes(one_at_a_time), copies)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        check_writer("SWAN", SAVED_KEYS, state_dict)

    def _loaded_dtype(self, key: str, saved: Tensor, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        """Adam's moments have at least float32, whatever the parameters have; a momentum buffer is as it is made."""
        if key in ("exp_avg", "exp_avg_sq"):
            return torch.promote_types(torch.promote_types(saved.dtype, param.dtype), torch.float32)
        return buffer_dtype(param.dtype) if key == "momentum_buffer" else torch.float32

    def _begin(self) -> None:
        """Counts the step."""
        for group in self.param_groups:
            group["step"] += 1

    def _move(self, places: Iterable[tuple[int, int, Tensor]]) -> None:
        self._update(places if self._pieces is None else move_pieces(self, list(places), _directions_of, _elements))

    def _update_in_backward(self, group_index: int, index: int, param: Tensor) -> bool:
        with undisturbed(self._multiplies):
            self._update([(group_index, index, param)])
        return True

    def _update(self, places: Iterable[tuple[int, int, Tensor]]) -> None:
        """Updates those of some parameters that have a gradient."""
        matrices: dict[Any, list[Matrix]] = {}
        rest: list[tuple[int, str, Tensor]] = []
        for group_index, index, param in places:
            group = self.param_groups[group_index]
            if param.requires_grad or param.grad is not None:
                self._make_state(group_index, index, param)
            if param.grad is None:
                continue
            name = self._name(group_index, index)
            check_gradient(param, name, type(self).__name__)
            if group["routes"][index] == ADAM:
                rest.append((group_index, name, param))
                continue
            mesh = sharding_of(param).mesh if is_sharded(param) else None
            rounding = self._rounding(group) if param.dtype == torch.bfloat16 else None
            matrix = Matrix(group, name, param, gradient_of(param), layout_of(group["routes"][index]), rounding)
            matrices.setdefault((param.device, mesh), []).append(matrix)
        for (_, mesh), found in matrices.items():
            self._whiten(found, mesh)
        self._update_by_adam(rest)

    def _make_state(self, group_index: int, index: int, param: Tensor) -> None:
        """
        Where there is none yet. A matrix keeps no tensor, but a count: torch.distributed.checkpoint does not load a
        parameter without any state.
        """
        state = self.state[param]
        if not state:
            for_adam = self.param_groups[group_index]["routes"][index] == ADAM
            state.update(new_adam_state(param) if for_adam else {"step": 0})

    def _update_by_adam(self, places: list[tuple[int, str, Tensor]]) -> None:
        """
        Group index, name and tensor of those that Adam updates. One whose gradient is not finite stays; on an
        accelerator all that are there.
        """
        found = self._find_not_finite([gradient_of(param) for *_, param in places], lambda index: places[index][1])
        batches: dict[tuple[int, int], tuple[AdamBatch, Tensor | None]] = {}
        for index, (group_index, _, param) in enumerate(places):
            if index in found.bad:
                continue
            state, flag = self.state[param], found.on_device.get(index)
            batch, _ = batches.setdefault((group_index, id(flag)), (AdamBatch(), flag))
            moments = (local(state["exp_avg"]), local(state["exp_avg_sq"]))
            batch.append(local(param), local(gradient_of(param)), *moments, state["step"])
        for (group_index, _), (batch, flag) in batches.items():
            group = self.param_groups[group_index]
            _adam(group, batch, self._rounding(group), flag)

    def _whiten(self, matrices: list[Matrix], mesh: Any) -> None:
        """Whitens matrices on one device or, with a mesh, sharded over one; and moves the parameters."""
        batches = batches_of(matrices)
        ordered = [matrix for batch in batches for matrix in batch]
        names = [matrix.name for matrix in ordered]
        size = sizes([local(matrix.source) for matrix in ordered])
        flags = size.isfinite()
        shared = mesh is None and self._shares(names, size)
        states = [self.state[matrix.param] for matrix in ordered]
        if mesh is not None:
            flags = over_ranks(flags.logical_not().float(), *ranks_of(mesh)) == 0.0
        finite = self._tell_of(names, flags, states)
        counts = [len(batch) for batch in batches]
        split = [None] * len(batches) if finite is None else finite.split(counts)
        size = as_divisors(size)
        work = [Batch(*each) for each in zip(batches, size.split(counts), split, strict=True)]
        for batch in work:
            self._advance_means(batch)
        if mesh is not None:
            whiten_sharded(work)
        elif shared:
            whiten_shared(work)
        else:
            for batch in work:
                updates, norms = whiten(batch)
                move(batch, updates, norms)
        # On an accelerator all are counted; those that did not move are counted back when that is known.
        moved = [True] * len(states) if finite is None or not is_known_at_once(finite.device) else finite.tolist()
        for state, has_moved in zip(states, moved, strict=True):
            state["step"] += has_moved

    def _shares(self, names: list[str], size: Tensor) -> bool:
        """Whether the ranks share the work; they compare their gradients before the first step that does."""
        if not self.share_whitening or ranks() == 1:
            return False
        if not self.__dict__.get("_ranks_agree"):
            if differ(names, size):
                raise RuntimeError(
                    "share_whitening=True needs equal gradients on all ranks, as DistributedDataParallel makes them, "
                    f"but those of rank {torch.distributed.get_rank()} and another differ; wrap the model in it, or "
                    "set share_whitening=False"
                )
            self.__dict__["_ranks_agree"] = True
        return True

    def _advance_means(self, batch: Batch) -> None:
        """Takes the gradients into the momentum buffers, which are what is whitened then; inf and NaN are not."""
        by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        if not batch.matrices[0].group["momentum"]:
            return
        for index, matrix in enumerate(batch.matrices):
            state, weight = self.state[matrix.param], 1.0 - matrix.group["momentum"]
            kept, finite = state.get("momentum_buffer"), batch.finite
            if kept is None:
                dtype = buffer_dtype(matrix.param.dtype)
                kept = torch.zeros_like(matrix.param, dtype=dtype, memory_format=torch.preserve_format)
                weight = 1.0
                if finite is None or not is_known_at_once(finite.device) or bool(finite[index]):
                    state["momentum_buffer"] = kept
            buffer, gradient = local(kept), local(matrix.source)
            if batch.finite is not None:
                gradient = torch.where(batch.finite[index], gradient, buffer)
            buffers, gradients = by_weight.setdefault(weight, ([], []))
            buffers.append(buffer)
            gradients.append(gradient.to(buffer.dtype))
            matrix.source = kept
        for weight, (buffers, gradients) in by_weight.items():
            torch._foreach_lerp_(buffers, gradients, weight)
        batch.size = as_divisors(sizes([local(matrix.source) for matrix in batch.matrices]))

    def _tell_of(self, names: list[str], finite: Tensor, states: list[dict[str, Any]]) -> Tensor | None:
        """The flags, or `None` where all are set and that can be read; has those that are not told of."""
        if is_known_at_once(finite.device):
            if bool(finite.all()):
                return None
            self._tell_not_finite([name for name, good in zip(names, finite.tolist(), strict=True) if not good])
            return finite
        undo = [functools.partial(_put_back, state, dict(state)) for state in states]
        self._late_news.send(finite.logical_not(), list(zip(names, undo, strict=True)))
        return finite


def _put_back(state: dict[str, Any], before: dict[str, Any]) -> None:
    """Undoes a step that a device left out: its count, and a buffer that began; one that was there did not move."""
    state.clear()
    state.update(before)


def _directions_of(group: dict[str, Any], route: str, grads: Tensor) -> Tensor:
    """Update directions of RMS 1 for a stack of whole gradients."""
    like = Matrix(group, "", grads[0], grads[0], layout_of(route))
    return scaled(*directions(in_range(grads, sizes(list(grads.unbind(0)))), like))


def _elements(group: dict[str, Any], device: torch.device) -> int:
    """That are whitened at once."""
    return batch_bytes(group, device) // BYTES_PER_ELEMENT


def _adam(group: dict[str, Any], batch: AdamBatch, rounding: Rounding | None, found: Tensor | None) -> None:
    ratio = group["adam_lr_ratio"]
    adam_update(
        batch,
        rounding,
        found,
        lr=group["lr"] * ratio,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"] / ratio,
        maximize=group["maximize"],
    )
