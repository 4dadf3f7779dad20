"""
SWAN: stateless SGD that normalises and whitens each matrix gradient, and Adam for what is no matrix.

Source: Ma, Gong, Scetbon, Meeds, "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training", arXiv
2412.13148.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam_update import AdamBatch, adam_update, new_adam_state
from .base import NamedOptimizer, check_writer
from .checks import check_choice, check_flag, check_number, check_share, check_whole
from .flags import LateFlags
from .rounding import Rounding
from .routing import ADAM, LORA_POLICIES, Layout, Route, layout_of, routes_of_group
from .sharding import Sharding, sharding_of
from .tensors import LIST_NUMEL, check_gradient, gradient_of, is_sharded, local
from .whitening import Method, check_whitening, swan_direction


logger = logging.getLogger(__name__)

KINDS = ("auto", "swan", "adam")
WHITENING_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Bytes that whitening needs per element of a batch, copies and products included: measured, see tests/test_swan.py.
BYTES_PER_ELEMENT = 32
CPU_BATCH_BYTES, ACCELERATOR_BATCH_BYTES = 2**25, 2**30


@dataclass
class _Matrix:
    """A tensor to whiten in this step."""

    group: dict[str, Any]
    name: str
    param: Tensor
    grad: Tensor
    layout: Layout


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

    Matrices of equal shape are whitened together across layers. A zero gradient gives a zero update. A matrix whose
    gradient has inf or NaN is left alone in that step, with one warning (on an accelerator in the next step, because
    reading it at once would make the device wait).

    DTensors (FSDP2) are whitened whole: each batch is exchanged so that every rank whitens its share of the matrices.

    A group holds, besides the options, `kind` (`"swan"`, `"adam"` or `"auto"`) and for each of its parameters `routes`
    and `reasons`. State per tensor: for Adam's `step`, `exp_avg`, `exp_avg_sq`; for a matrix `step`, a plain number,
    and with `momentum` a `momentum_buffer`.

    Args:
        params (iterable of `torch.Tensor`, of `("name", tensor)` pairs, or of group `dict`s):
            What to optimize; `hf_sai.param_groups(model, "swan")` for a model.
        lr (`float`, *optional*, defaults to 1e-3):
            Learning rate, in AdamW's terms: the one that is right for AdamW is a good start.
        whitening (`str`, *optional*, defaults to `"polar_express"`):
            `"polar_express"`, `"newton_schulz"` (the paper's iteration) or `"svd"`; see
            [`hf_sai.optim.whitening.grad_whitening`].
        ns_steps (`int`, *optional*): Steps of the iteration; `None` for the method's own (6, and the paper's 10).
        whitening_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Of the arithmetic of `"polar_express"`: `"bfloat16"` or `"float32"`. The others compute in float32.
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
            Bound on the extra memory of whitening, as long as one matrix fits into it. `None`: 32 MiB on the CPU,
            which stays near the caches, and 1 GiB elsewhere.

    Raises:
        `ValueError`: An option is out of its range, or a group of kind `"swan"` holds a tensor that is no matrix.
        `RuntimeError`: In `step()`, a gradient is sparse, or a DTensor is laid out as it can't be gathered.

    Example:

    ```python
    optimizer = SWAN(hf_sai.param_groups(model, "swan", weight_decay=0.1), lr=1e-3)
    ```
    """

    _progress = ("lr", "step")
    _chosen = ("lora_whitening", "split_qkv", "target_modules")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        whitening: Method = "polar_express",
        ns_steps: int | None = None,
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
    ) -> None:
        defaults = {
            "lr": lr,
            "whitening": whitening,
            "ns_steps": ns_steps,
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
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Adds a group, in the middle of training too.

        Args:
            param_group (`dict`): `"params"`, the options that differ from the defaults, `"kind"`, and where they are
                known `"routes"` and `"reasons"`, one per parameter.

        Raises:
            `ValueError`: An option is out of its range, or a route does not fit.
        """
        merged = {**self.defaults, **param_group}
        _check_options(merged)
        shared = {"params": self._with_names(param_group["params"])}
        if self.param_groups:
            shared["step"] = self.param_groups[0]["step"]
        super().add_param_group({**param_group, **shared})
        group = self.param_groups[-1]
        if "routes" not in group:
            group["routes"], group["reasons"] = routes_of_group(group)
        group.setdefault("reasons", [""] * len(group["routes"]))
        if len(group["routes"]) != len(group["params"]):
            self.param_groups.pop()
            raise ValueError(
                f"a group must have one route per parameter but has {len(group['routes'])} for "
                f"{len(group['params'])}; leave them out, or take what hf_sai.param_groups gives"
            )
        for route in group["routes"]:
            if route != ADAM:
                layout_of(route)

    def routes(self) -> list[Route]:
        """Where each parameter goes and why, in the order of the groups."""
        return [
            Route(self._name(group_index, index), param, group["routes"][index], group["reasons"][index])
            for group_index, index, param in self._params()
            for group in [self.param_groups[group_index]]
        ]

    def whitening_bytes(self, one_at_a_time: bool = False) -> int:
        """
        A bound on what whitening needs for a while in a step, with gradients in the parameters' dtype; reads shapes.

        Args:
            one_at_a_time (`bool`, *optional*, defaults to `False`): As layer-wise updates whiten.
        """
        batches: dict[Any, list[_Matrix]] = {}
        for row, (group_index, _, param) in zip(self.routes(), self._params(), strict=True):
            if row.route != ADAM:
                matrix = _Matrix(self.param_groups[group_index], row.name, param, param, layout_of(row.route))
                batches.setdefault(_batch_key(matrix), []).append(matrix)
        counts = [
            (1 if one_at_a_time else len(batch), batch[0].param.numel())
            for matrices in batches.values()
            for batch in _chunks(matrices)
        ]
        return max((BYTES_PER_ELEMENT * count * numel for count, numel in counts), default=0)

    def extra_bytes(self, one_at_a_time: bool = False) -> int:
        """The most that a step needs for a while: as `whitening_bytes`, or Adam's float32 copies of low precision."""
        to_adam = [row.param for row in self.routes() if row.route == ADAM and row.param.dtype != torch.float32]
        copies = max((2 * 4 * min(param.numel(), LIST_NUMEL) for param in to_adam), default=0)
        return max(self.whitening_bytes(one_at_a_time), copies)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Loads what `state_dict()` gave, Adam's moments in float32 whatever the parameters' dtype.

        Raises:
            `ValueError`: The state was written by another optimizer.
        """
        check_writer("SWAN", state_dict)
        self._warn_of_other_options(state_dict["param_groups"])
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for saved_id, (_, _, param) in zip(saved_ids, self._params(), strict=True):
            saved_state = state_dict["state"].get(saved_id, {})
            for key in ("exp_avg", "exp_avg_sq"):
                saved = saved_state.get(key)
                if saved is not None and self.state[param][key].dtype != torch.promote_types(saved.dtype, param.dtype):
                    self.state[param][key] = saved.to(device=param.device, copy=True)
            # torch leaves `step` where the checkpoint was mapped to, and the fused kernel reads it on its own device.
            for key, value in self.state[param].items():
                if isinstance(value, Tensor) and value.device != param.device:
                    self.state[param][key] = value.to(param.device)

    def _advance(self) -> None:
        self._warn_not_finite()
        for group in self.param_groups:
            group["step"] += 1
        self._update(self._params())

    def _update_in_backward(self, group_index: int, index: int, param: Tensor) -> bool:
        self._update([(group_index, index, param)])
        return True

    def _update(self, places: Iterable[tuple[int, int, Tensor]]) -> None:
        """Updates those of some parameters that have a gradient."""
        batches: dict[Any, list[_Matrix]] = {}
        rest: dict[int, AdamBatch] = {}
        for group_index, index, param in places:
            group = self.param_groups[group_index]
            if param.requires_grad or param.grad is not None:
                self._make_state(param, group["routes"][index] == ADAM)
            if param.grad is None:
                continue
            name = self._name(group_index, index)
            check_gradient(param, name, type(self).__name__)
            if group["routes"][index] == ADAM:
                self._collect_for_adam(rest.setdefault(group_index, AdamBatch()), param)
                continue
            matrix = _Matrix(group, name, param, gradient_of(param), layout_of(group["routes"][index]))
            batches.setdefault(_batch_key(matrix), []).append(matrix)
        for matrices in batches.values():
            for batch in _chunks(matrices):
                self._whiten(batch)
        for group_index, adam_batch in rest.items():
            group = self.param_groups[group_index]
            _adam(group, adam_batch, self._rounding(group))

    def _make_state(self, param: Tensor, for_adam: bool) -> None:
        """
        Where there is none yet. A matrix keeps no tensor, but a count: torch.distributed.checkpoint does not load a
        parameter without any state.
        """
        state = self.state[param]
        if not state:
            state.update(new_adam_state(param) if for_adam else {"step": 0})

    def _collect_for_adam(self, batch: AdamBatch, param: Tensor) -> None:
        state = self.state[param]
        moments = (local(state["exp_avg"]), local(state["exp_avg_sq"]))
        batch.append(local(param), local(gradient_of(param)), *moments, state["step"])

    def _whiten(self, batch: list[_Matrix]) -> None:
        """Whitens matrices of one shape together, and moves the parameters."""
        first = batch[0]
        sharding = sharding_of(first.param) if is_sharded(first.param) else None
        grads = torch.stack([local(matrix.grad) for matrix in batch])
        finite = self._finite(batch, grads, sharding)
        if finite is not None:
            good = finite.view(-1, *[1] * (grads.ndim - 1))
            grads = torch.where(good, grads, 0.0)
        if first.group["momentum"]:
            grads = self._running_means(batch, grads, finite)
            grads = grads if finite is None else torch.where(good, grads, 0.0)
        if sharding is not None:
            grads = sharding.gather(grads)
        updates = _directions(grads, first) if len(grads) else grads
        del grads
        if sharding is not None:
            updates = sharding.scatter(updates, len(batch))
        rounding = self._rounding(first.group)
        for index, matrix in enumerate(batch):
            kept = None if finite is None else finite[index]
            _move(matrix, updates[index], kept, rounding)
            self.state[matrix.param]["step"] += 1

    def _running_means(self, batch: list[_Matrix], grads: Tensor, finite: Tensor | None) -> Tensor:
        """The momentum buffers after these gradients, stacked; one whose gradient is not finite stays as it is."""
        means = []
        for index, matrix in enumerate(batch):
            state, weight = self.state[matrix.param], 1.0 - matrix.group["momentum"]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix.param, memory_format=torch.preserve_format)
                weight = 1.0
            buffer = local(state["momentum_buffer"])
            buffer.lerp_(grads[index], weight if finite is None else weight * finite[index].to(buffer.dtype))
            means.append(buffer)
        return torch.stack(means)

    def _finite(self, batch: list[_Matrix], grads: Tensor, sharding: Sharding | None) -> Tensor | None:
        """Per tensor of the batch whether its gradient is finite; `None` where all are, and that can be read."""
        # The largest absolute value is finite only if all are; one pass, no mask the size of the gradients.
        finite = torch.linalg.vector_norm(grads.flatten(1), ord=math.inf, dim=1).isfinite()
        if sharding is not None:
            finite = sharding.everywhere(finite)
        names = [matrix.name for matrix in batch]
        if finite.device.type == "cpu":
            if bool(finite.all()):
                return None
            self._tell_not_finite([name for name, good in zip(names, finite.tolist(), strict=True) if not good])
            return finite
        self.__dict__.setdefault("_late_flags", LateFlags()).leave(names, finite)
        return finite

    def _warn_not_finite(self) -> None:
        """Reads what the steps before left to be read, as far as it has arrived."""
        late: LateFlags | None = self.__dict__.get("_late_flags")
        bad = late.take_false() if late is not None else []
        if bad:
            self._tell_not_finite(bad)

    def _tell_not_finite(self, names: list[str]) -> None:
        """One warning per step, with tensors that no earlier one named."""
        new = self._new_names(names)
        if new:
            logger.warning(
                "The gradient of %s has inf or NaN: not updated in this step, nor in later ones like it.", new
            )


def _batch_key(matrix: _Matrix) -> Any:
    """Tensors with the same key can be stacked and whitened by one call."""
    param, group = matrix.param, matrix.group
    place = sharding_of(param).key if is_sharded(param) else ()
    options = [group[name] for name in ("whitening", "ns_steps", "whitening_dtype", "maximize")]
    options.append(bool(group["momentum"]))
    return (tuple(param.shape), matrix.layout, param.device, matrix.grad.dtype, place, *options)


def _chunks(matrices: list[_Matrix]) -> Iterator[list[_Matrix]]:
    """Batches within the bound on extra memory; sharded ones as many times larger as there are ranks to share them."""
    param = matrices[0].param
    default = CPU_BATCH_BYTES if param.device.type == "cpu" else ACCELERATOR_BATCH_BYTES
    bound = min(matrix.group["max_batch_bytes"] or default for matrix in matrices)
    ranks = sharding_of(param).ranks if is_sharded(param) else 1
    size = max(1, bound // (BYTES_PER_ELEMENT * max(1, param.numel()))) * ranks
    for start in range(0, len(matrices), size):
        yield matrices[start : start + size]


def _directions(grads: Tensor, like: _Matrix) -> Tensor:
    """Update directions of a stack of gradients, in the shape of the parameters."""
    group = like.group
    dtype = WHITENING_DTYPES[group["whitening_dtype"]]
    found = swan_direction(like.layout.matrices(grads), group["whitening"], group["ns_steps"], dtype)
    if group["maximize"]:
        found.neg_()
    return like.layout.tensors(found, grads.shape[1:])


def _move(matrix: _Matrix, update: Tensor, finite: Tensor | None, rounding: Rounding | None) -> None:
    """`W (1 - lr * weight_decay) - lr * scale * dW` in float32, rounded once; no decay without a finite gradient."""
    group, param = matrix.group, local(matrix.param)
    lr = float(group["lr"])
    wide = param.to(torch.promote_types(param.dtype, torch.float32))
    if group["weight_decay"]:
        decay = lr * group["weight_decay"]
        wide.mul_(1.0 - decay if finite is None else 1.0 - decay * finite.to(wide.dtype))
    wide.add_(update, alpha=-lr * group["scale"])
    if wide is not param:
        if rounding is not None:
            rounding.before(wide, param.dtype)
        param.copy_(wide)


def _adam(group: dict[str, Any], batch: AdamBatch, rounding: Rounding | None) -> None:
    ratio = group["adam_lr_ratio"]
    adam_update(
        batch,
        rounding,
        lr=float(group["lr"]) * ratio,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"] / ratio,
        maximize=group["maximize"],
    )


def _check_options(options: dict[str, Any]) -> None:
    """Raises `ValueError` for the first option that is out of its range."""
    for name in ("lr", "weight_decay", "eps"):
        check_number(name, options[name], "give a number such as 0.001")
    for name in ("scale", "adam_lr_ratio"):
        check_number(name, options[name], "the default is 3.0", positive=True)
    check_whitening(options["whitening"], options["ns_steps"])
    check_choice("whitening_dtype", options["whitening_dtype"], WHITENING_DTYPES, "float32 keeps all digits")
    betas = options["betas"]
    if not (isinstance(betas, (list, tuple)) and len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas)):
        raise ValueError(f"betas must be two numbers in [0, 1) but is {betas!r}; the default is (0.9, 0.999)")
    check_share("momentum", options["momentum"], "the paper has none, 0.0")
    for name in ("maximize", "stochastic_rounding"):
        check_flag(name, options[name])
    check_whole("max_batch_bytes", options["max_batch_bytes"], "None chooses by itself", optional=True)
    check_choice("lora_whitening", options["lora_whitening"], LORA_POLICIES, optional=True)
    check_flag("split_qkv", options["split_qkv"])
    check_choice("kind", options["kind"], KINDS, "'auto' goes by the dimensions")
