"""
SGD-SaI: momentum SGD whose per-tensor learning-rate scale is measured once, at the first step.

Source: arXiv 2412.11768, Algorithm 1; the authors' package `sgd-sai` 1.0.3 where the two differ (`normalize`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .gsnr import GradientMoments, fallback_snr, gradient_moments, gradient_snr


logger = logging.getLogger(__name__)

NORMALIZATIONS = ("none", "max")


@dataclass(frozen=True)
class TensorGSNR:
    """
    What SGD-SaI knows of one tensor; a row of the g-SNR report.

    Args:
        name (`str`): The parameter's name where the groups carry names, else `group<i>.<j>`.
        shape (`tuple[int, ...]`): Shape of the parameter.
        numel (`int`): Number of elements.
        group (`int`): Index of its parameter group.
        gsnr (`float`): Measured g-SNR, `sqrt(numel)` for a fallback, 0.0 while pending.
        scale (`float`): What the learning rate is multiplied by: `gsnr`, or `gsnr / max` under `normalize="max"`.
        step (`int`): Optimizer step (from 1) of its first informative gradient, 0 while pending.
        status (`str`): `"measured"`, `"fallback"` (constant gradient or one element) or `"pending"` (no gradient yet
            that is finite and not all zero).
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    group: int
    gsnr: float
    scale: float
    step: int
    status: str


class SGDSaI(Optimizer):
    r"""
    Momentum SGD with a learning-rate scale per tensor that is measured from the first gradient (arXiv 2412.11768).

    For a tensor with gradient `g` of `n` elements, `scale` is fixed at its first informative gradient:

        g_snr = ||g|| / (std(g) + eps)
        scale = g_snr                         normalize="none": the authors' package, sgd-sai 1.0.3
        scale = g_snr / max over all tensors  normalize="max":  Algorithm 1 of the paper
        m_1   = g_1,  m_t = momentum * m_{t-1} + (1 - momentum) * g_t
        theta = theta * (1 - lr * weight_decay) - lr * scale * m_t

    A gradient is informative if it is finite and not all zero. Until a tensor has had one it is *pending*: a zero
    gradient changes nothing but the decay, a gradient with inf or NaN skips that tensor for that step with one
    warning. So LoRA's `A`, whose gradient is zero at step 1 because `B` is zero, is measured at the first step after
    `B` moved and trains; the published implementations freeze it. A tensor of one element, or whose gradient is
    constant to the precision of its dtype, has no standard deviation: its g-SNR is `sqrt(n)`, marked as fallback, and
    it never sets the maximum.

    A learning rate means nothing without `normalize`: the two variants differ by the largest g-SNR of the model, some
    500 times on a tiny GPT-2 and 6,000 times on GPT-2.

    State per tensor: `gsnr` (float), `gsnr_step` and `gsnr_count` (int), `gsnr_fallback` (bool), and
    `momentum_buffer` (parameter's shape and dtype) where `momentum` is not 0: half of AdamW's. It is made for every
    trainable tensor in the first `step()`, so that its keys depend neither on which gradients came nor on parameters
    that a sharding library replaces after construction. `state_dict()` holds plain values and tensors only.

    Args:
        params (iterable of `torch.Tensor`, of `("name", tensor)` pairs, or of group `dict`s):
            What to optimize. Names appear in warnings and in [`~SGDSaI.gsnr_statistics`].
        lr (`float`, *optional*, defaults to 1e-2):
            Learning rate, before `scale`.
        momentum (`float`, *optional*, defaults to 0.9):
            Decay of the momentum buffer, in [0, 1). 0 keeps no buffer.
        weight_decay (`float`, *optional*, defaults to 1e-2):
            Decoupled decay: `theta` shrinks by `lr * weight_decay`, without `scale`. Never part of the gradient.
        eps (`float`, *optional*, defaults to 1e-8):
            Added to the standard deviation, in units of the gradient.
        normalize (`str`, *optional*, defaults to `"none"`):
            `"none"` or `"max"`, one for all groups. The maximum is taken over all groups and fixed at the end of the
            first step that measured (of the first `measure_steps` such steps), and stays for tensors measured later.
        measure_steps (`int`, *optional*, defaults to 1):
            g-SNR is the mean over this many first informative gradients of each tensor. 1 is the paper.
        maximize (`bool`, *optional*, defaults to `False`):
            Ascend instead of descend. `p.grad` is not written.

    Raises:
        `ValueError`: An option is out of its range, or groups ask for different `normalize`.
        `RuntimeError`: In `step()`, a gradient is sparse, or a parameter is complex or sharded.

    Example:

    ```python
    optimizer = SGDSaI(model.named_parameters(), lr=1e-2)
    loss_fn(model(inputs), targets).backward()
    optimizer.step()
    print(optimizer.gsnr_statistics()[0])
    ```
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        *,
        normalize: Literal["none", "max"] = "none",
        measure_steps: int = 1,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "normalize": normalize,
            "measure_steps": measure_steps,
            "maximize": maximize,
            # Not options, but they decide updates and so live where state_dict() saves them. Equal in every group.
            "step": 0,
            "gsnr_max": 0.0,
            "gsnr_max_step": 0,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Adds a group, in the middle of training too: its tensors are pending, and share the step and the maximum.

        Args:
            param_group (`dict`): `"params"` and the options that differ from the defaults.

        Raises:
            `ValueError`: An option is out of its range, or `normalize` differs from the other groups'.
        """
        first = self.param_groups[0] if self.param_groups else self.defaults
        merged = {**self.defaults, **param_group}
        _check_options(merged)
        if merged["normalize"] != first["normalize"]:
            raise ValueError(
                f"normalize must be the same in all parameter groups but is {merged['normalize']!r} beside "
                f"{first['normalize']!r}; the maximum is taken over the whole model, so set it once"
            )
        shared = {key: first[key] for key in ("step", "gsnr_max", "gsnr_max_step")}
        super().add_param_group({**param_group, **shared})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        One update; measures the tensors whose g-SNR is not settled yet.

        Args:
            closure (callable, *optional*): Recomputes the loss and the gradients, and returns the loss. Called once.

        Returns:
            `float` or `None`: What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._init_state()
        first, skipped = self._measure()
        normalizer = self._normalizer()
        for group in self.param_groups:
            momentum = group["momentum"]
            for param in group["params"]:
                if param.grad is None or param in skipped:
                    continue
                state = self.state[param]
                is_first = param in first
                if momentum != 0 and "momentum_buffer" not in state:  # switched on after the first step
                    state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                    is_first = True
                _update_tensor(
                    param,
                    param.grad,
                    state["momentum_buffer"] if momentum != 0 else None,
                    is_first=is_first,
                    lr=float(group["lr"]),
                    scale=state["gsnr"] / normalizer,
                    momentum=momentum,
                    weight_decay=group["weight_decay"],
                    maximize=group["maximize"],
                )
        return loss

    def gsnr_statistics(self) -> list[TensorGSNR]:
        """
        What has been measured, one row per tensor in the order of the groups. Reads no device memory.

        Returns:
            `list[TensorGSNR]`: Frozen parameters that were never measured are left out.
        """
        rows = []
        normalizer = self._normalizer()
        for group_index, index, param in self._params():
            state = self.state.get(param, {})
            gsnr = state.get("gsnr", 0.0)
            if not param.requires_grad and not gsnr:
                continue
            rows.append(
                TensorGSNR(
                    name=self._name(group_index, index),
                    shape=tuple(param.shape),
                    numel=param.numel(),
                    group=group_index,
                    gsnr=gsnr,
                    scale=gsnr / normalizer,
                    step=state.get("gsnr_step", 0),
                    status=_status(state),
                )
            )
        return rows

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Loads what `state_dict()` gave, each momentum buffer in the dtype that it was saved in.

        Raises:
            `ValueError`: The state was written by another optimizer.
        """
        foreign = [
            key for group in state_dict["param_groups"] for key in ("normalize", "gsnr_max") if key not in group
        ]
        if foreign:
            kept = sorted({key for values in state_dict["state"].values() for key in values})
            raise ValueError(
                f"SGDSaI loads only state that SGDSaI saved, but this state keeps {', '.join(kept) or 'nothing'} per "
                f"tensor and its groups have no {foreign[0]!r}; another optimizer wrote it, so resume with that one "
                "or start without its checkpoint"
            )
        super().load_state_dict(state_dict)
        self._restore_buffer_dtypes(state_dict)

    def _restore_buffer_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Undoes the cast to the parameter's dtype in `torch.optim.Optimizer.load_state_dict`, which loses digits."""
        saved_ids = (index for group in state_dict["param_groups"] for index in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for saved_id, param in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(saved_id, {}).get("momentum_buffer")
            if saved is not None and saved.dtype != param.dtype:
                self.state[param]["momentum_buffer"] = saved.to(device=param.device, copy=True)

    def _params(self) -> Iterator[tuple[int, int, Tensor]]:
        """Group index, index in the group, tensor."""
        for group_index, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                yield group_index, index, param

    def _name(self, group_index: int, index: int) -> str:
        names = self.param_groups[group_index].get("param_names")
        return names[index] if names else f"group{group_index}.{index}"

    def _init_state(self) -> None:
        """Makes the state of every trainable tensor that has none, and refuses what the update can't do."""
        for group_index, index, param in self._params():
            if not param.requires_grad and param.grad is None:
                continue
            if param.grad is not None:
                _check_gradient(param, self._name(group_index, index))
            state = self.state[param]
            if state:
                continue
            state.update({"gsnr": 0.0, "gsnr_step": 0, "gsnr_count": 0, "gsnr_fallback": False})
            if self.param_groups[group_index]["momentum"] != 0:
                state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def _measure(self) -> tuple[set[Tensor], set[Tensor]]:
        """
        Measures every tensor whose g-SNR is not settled.

        Returns:
            Two sets of tensors: those that had their first informative gradient now (the momentum buffer starts with
            it), and those to leave alone in this step (first gradient not finite).
        """
        unsettled = [
            (group_index, index, param, param.grad)
            for group_index, index, param in self._params()
            if param.grad is not None
            and self.state[param]["gsnr_count"] < self.param_groups[group_index]["measure_steps"]
        ]
        moments = gradient_moments([gradient for *_, gradient in unsettled])
        self._count_step(moments)
        first: set[Tensor] = set()
        skipped: set[Tensor] = set()
        for (group_index, index, param, _), moment in zip(unsettled, moments, strict=True):
            state = self.state[param]
            if not moment.is_finite:
                if state["gsnr_step"] == 0:
                    skipped.add(param)
                    self._warn_not_finite(self._name(group_index, index), moment)
            elif not moment.is_zero:
                if state["gsnr_step"] == 0:
                    first.add(param)
                    state["gsnr_step"] = self.param_groups[group_index]["step"]
                _record(state, moment, self.param_groups[group_index]["eps"])
        if moments:
            self._update_max()
        return first, skipped

    def _count_step(self, moments: list[GradientMoments]) -> None:
        """
        Counts this step, unless nothing has been measured yet and all gradients are zero.

        torch.distributed.checkpoint makes such a step to create the state before it loads; it must leave no trace.
        """
        started = any(state["gsnr_step"] for state in self.state.values()) if moments else True
        if not started and all(moment.is_zero for moment in moments):
            return
        for group in self.param_groups:
            group["step"] += 1

    def _update_max(self) -> None:
        """Sets the maximum over the model in the first `measure_steps` steps that measured; it then stays."""
        measured = [state for state in self.state.values() if state["gsnr_step"] and not state["gsnr_fallback"]]
        if not measured:
            return
        first_step = self.param_groups[0]["gsnr_max_step"] or self.param_groups[0]["step"]
        window = max(group["measure_steps"] for group in self.param_groups)
        if self.param_groups[0]["step"] >= first_step + window:
            return
        largest = max(state["gsnr"] for state in measured)
        for group in self.param_groups:
            group["gsnr_max"] = largest
            group["gsnr_max_step"] = first_step

    def _normalizer(self) -> float:
        """What g-SNR is divided by to give the scale."""
        group = self.param_groups[0]
        if group["normalize"] == "none":
            return 1.0
        # While only fallbacks were seen there is no maximum; the largest of them then keeps the scale at 1 or below.
        return group["gsnr_max"] or max((state["gsnr"] for state in self.state.values()), default=0.0) or 1.0

    def _warn_not_finite(self, name: str, moment: GradientMoments) -> None:
        """One warning per tensor and process."""
        warned: set[str] = self.__dict__.setdefault("_warned_not_finite", set())
        if name not in warned:
            warned.add(name)
            logger.warning(
                "The first gradient of %s (%d elements) has inf or NaN: it is not measured and not updated in this "
                "step. It will be measured at its first finite gradient.",
                name,
                moment.count,
            )


def _check_options(options: dict[str, Any]) -> None:
    """Raises `ValueError` for the first option that is out of its range."""
    for name in ("lr", "weight_decay", "eps"):
        if not 0.0 <= options[name] < math.inf:
            raise ValueError(f"{name} must be finite and >= 0 but is {options[name]}; give a number such as 0.01")
    if not 0.0 <= options["momentum"] < 1.0:
        raise ValueError(f"momentum must be in [0, 1) but is {options['momentum']}; the paper uses 0.9")
    if options["normalize"] not in NORMALIZATIONS:
        raise ValueError(
            f"normalize must be one of {', '.join(NORMALIZATIONS)} but is {options['normalize']!r}; "
            "choose one (the learning rate depends on it)"
        )
    steps = options["measure_steps"]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"measure_steps must be a whole number >= 1 but is {steps!r}; the paper uses 1")
    if not isinstance(options["maximize"], bool):
        raise ValueError(f"maximize must be True or False but is {options['maximize']!r}; give one of the two")


def _check_gradient(param: Tensor, name: str) -> None:
    """Raises `RuntimeError` for a gradient that the update can't use."""
    assert param.grad is not None
    if param.grad.layout != torch.strided:
        raise RuntimeError(
            f"SGDSaI needs dense gradients but that of {name} is {param.grad.layout}; "
            "build its embedding with sparse=False"
        )
    if param.is_complex():
        raise RuntimeError(
            f"SGDSaI needs real parameters but {name} is {param.dtype}; store it as real and view it as complex"
        )
    if hasattr(param, "device_mesh"):
        raise RuntimeError(
            f"SGDSaI measures whole tensors but {name} is sharded (a DTensor, as FSDP2 and tensor parallelism make): "
            "its g-SNR would be too small by sqrt(shards); train it on one process or with DDP"
        )


def _record(state: dict[str, Any], moments: GradientMoments, eps: float) -> None:
    """Adds one informative gradient to a tensor's mean g-SNR."""
    constant = moments.is_constant
    gsnr = fallback_snr(moments) if constant else gradient_snr(moments, eps)
    state["gsnr_count"] += 1
    state["gsnr"] += (gsnr - state["gsnr"]) / state["gsnr_count"]
    state["gsnr_fallback"] = state["gsnr_fallback"] or constant


def _status(state: dict[str, Any]) -> str:
    if not state.get("gsnr_step"):
        return "pending"
    return "fallback" if state["gsnr_fallback"] else "measured"


def _update_tensor(
    param: Tensor,
    gradient: Tensor,
    buffer: Tensor | None,
    *,
    is_first: bool,
    lr: float,
    scale: float,
    momentum: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """
    The update of one tensor, in place; bf16 and fp16 are computed in float32 and rounded once.

    `scale` is 0.0 for a pending tensor, whose gradient is zero: only the decay is left.
    """
    sign = -1.0 if maximize else 1.0
    wide = torch.promote_types(param.dtype, torch.float32)
    direction = gradient.to(wide)
    if buffer is not None:
        average = buffer.to(wide)
        if is_first:
            average.copy_(direction).mul_(sign)
        else:
            average.mul_(momentum).add_(direction, alpha=sign * (1.0 - momentum))
        if average is not buffer:
            buffer.copy_(average)
        direction, sign = average, 1.0
    values = param.to(wide)
    values.mul_(1.0 - lr * weight_decay).add_(direction, alpha=-sign * lr * scale)
    if values is not param:
        param.copy_(values)
