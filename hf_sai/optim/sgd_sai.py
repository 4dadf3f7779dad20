"""
SGD-SaI: momentum SGD whose per-tensor learning-rate scale is measured once, at the first step.

Source: arXiv 2412.11768, Algorithm 1; the authors' package `sgd-sai` 1.0.3 where the two differ (`normalize`).
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import check_writer
from .checks import (
    check_choice,
    check_flag,
    check_number,
    check_share,
    check_whole,
    from_text,
    one_of,
    or_none,
    refuse_unknown,
    to_bool,
    to_float,
    to_int,
)
from .gsnr import NORMALIZATIONS, GradientMoments
from .lora_pairs import PAIR_POLICIES, bounded, check_pairs, first_factor, norm_of
from .scales import SHARED, MeasuredScales
from .sgd_update import Batch, next_coefficients, update
from .tensors import BLOCK_NUMEL, buffer_dtype, gradient_of, is_sharded, local
from .zero_layout import ZeroLayoutError


logger = logging.getLogger(__name__)

# No float16: the buffer has the gradient's unit, of which float16 loses what is below 1e-7 or above 65504.
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A bf16 number has 8 bits of mantissa: a change below half of 2^-8 of it is rounded away.
BF16_RESOLUTION = 2.0**-8


class SGDSaI(MeasuredScales):
    r"""
    Momentum SGD with a learning-rate scale per tensor that is measured from the first gradient (arXiv 2412.11768).

    For a tensor with gradient `g` of `n` elements, `scale` is fixed at its first informative gradient:

        g_snr = ||g|| / (std(g) + eps)
        scale = g_snr                         normalize="none": the authors' package, sgd-sai 1.0.3
        scale = g_snr / max over all tensors  normalize="max":  Algorithm 1 of the paper
        scale = g_snr / RMS over all elements of g_snr * g      normalize="rms":  ours; the first update has RMS lr
        m_1   = g_1,  m_t = momentum * m_{t-1} + (1 - momentum) * g_t
        theta = theta * (1 - lr * weight_decay) - lr * scale * m_t

    A gradient is informative if it is finite and not all zero. Until a tensor has had one it is *pending*: a zero
    gradient changes nothing but the decay. A gradient with inf or NaN leaves that tensor and its state as they are, at
    any step, with one warning (on an accelerator in the next step). So LoRA's `A`, whose gradient is zero at step 1
    because `B` is zero, is measured at the first step after `B` moved and trains; the published implementations freeze
    it. A tensor of one element, or whose gradient is constant to the precision of its dtype, has no standard
    deviation: its g-SNR is `sqrt(n)`, marked as fallback, and it never sets the maximum. (While nothing but fallbacks
    was seen, the largest of them divides under `"max"`.)

    A learning rate means nothing without `normalize`: the two variants differ by the largest g-SNR of the model, some
    500 times on a tiny GPT-2 and 6,000 times on GPT-2.

    State per tensor: `gsnr` (float), `gsnr_step` and `gsnr_count` (int), `gsnr_fallback` and `gsnr_given` (bool);
    `gradient_norm` and `weight_rms` (float) as they were at the first informative gradient, for the report; and where
    `momentum` is not 0 `momentum_buffer` (parameter's shape), `decay_ratio` and `decay` (float): half of AdamW's. The
    buffer holds `m_t + weight_decay / scale * theta_{t-1}`, by which decoupled decay needs no pass over memory of its
    own (derived in `hf_sai/optim/sgd_update.py`); so it belongs to the parameters it was saved with. State is made for
    every trainable tensor in the first `step()`, so that its keys depend neither on which gradients came nor on
    parameters that a sharding library replaces after construction. `state_dict()` holds plain values and tensors only.

    In a group with `paired=True`, which `hf_sai.param_groups(model, "sgd_sai", lora_policy="paired")` makes, the
    tensors are the factors A and B of LoRA in turn, and their gradients are bounded by the norm of each pair's first
    one, which is kept as `pair_norm` (float), as `hf_sai/optim/lora_pairs.py` says. A learning rate is there the RMS
    of B's first step, and the most that a later one can have (but for what g-SNR says beyond `sqrt(n)`): near AdamW's,
    not 1e-1. DTensors are refused in such a group.

    DTensors (FSDP2, tensor parallelism) are measured as whole tensors, with one collective in a step that measures,
    and updated shard by shard. Every rank has to call `step()`.

    Args:
        params (iterable of `torch.Tensor`, of `("name", tensor)` pairs, or of group `dict`s):
            What to optimize. Names appear in warnings and in [`~SGDSaI.gsnr_statistics`].
        lr (`float` or `torch.Tensor`, *optional*, defaults to 1e-2):
            Learning rate, before `scale`. A tensor without dimensions on the parameters' device is not read back, so
            that steps after the measuring ones can be captured in a CUDA graph; these take the plain path.
        momentum (`float`, *optional*, defaults to 0.9):
            Decay of the momentum buffer, in [0, 1). 0 keeps no buffer; one that is there waits, as torch's SGD has it.
        weight_decay (`float`, *optional*, defaults to 1e-2):
            Decoupled decay: `theta` shrinks by `lr * weight_decay`, without `scale`. Never part of the gradient.
        eps (`float`, *optional*, defaults to 1e-8):
            Added to the standard deviation, in units of the gradient. g-SNR never falls below `sqrt(n - 1)` by it.
        normalize (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"max"` or `"rms"`, one for all groups. What divides is taken over all groups and fixed at the
            end of the first step that measured (of the first `measure_steps` such steps), and stays for tensors
            measured later. With `"rms"` the first update has an RMS of `lr` over all elements that it moves, as Adam's
            has, so that AdamW's learning rate is the place to start.
        measure_steps (`int`, *optional*, defaults to 1):
            g-SNR is the mean over this many first informative gradients of each tensor. 1 is the paper.
        maximize (`bool`, *optional*, defaults to `False`):
            Ascend instead of descend. `p.grad` is not written.
        foreach (`bool`, *optional*):
            Whether to update lists of tensors at once. `None`: for small tensors on accelerators.
        fused (`bool`, *optional*):
            Whether to touch memory once per element. `None`: with torch's ready-made kernel, on CPU and for large
            tensors on CUDA, in float32 and float64. `True`: compiles a kernel for low precision too, which takes 10 to
            20 s in the second step; where that can't be done, one warning, and the plain path. The result is the same
            up to rounding.
        state_dtype (`str` or `torch.dtype`, *optional*):
            Of the momentum buffer: `"float32"` or `"bfloat16"`. `None`: the parameter's, but float32 for float16
            parameters: the buffer has the gradient's unit, and float16 loses gradients below 1e-7 and above 65504.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Rounds bf16 parameters at random instead of to the nearest, so that updates below their resolution are not
            lost. Uses torch's global random numbers.
        gsnr (iterable of rows, *optional*):
            Scales of another run instead of measuring: `report.tensors` or `gsnr_statistics()`. Parameters need names,
            the same as the rows'. A row that is pending is measured as usual.
        lora_policy (`str`, *optional*, defaults to `"plain"`):
            `"paired"`: every group alternates LoRA's A and B, as `hf_sai.param_groups` makes them for a model.

    Raises:
        `ValueError`: An option is out of its range, groups ask for different `normalize`, or `gsnr` does not fit.
        `RuntimeError`: In `step()`, a gradient is sparse, a parameter is complex, or a pair of factors is sharded.

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
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        *,
        normalize: Literal["none", "max", "rms"] = "none",
        measure_steps: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        state_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool = False,
        gsnr: Iterable[Any] | None = None,
        lora_policy: Literal["plain", "paired"] = "plain",
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self), unknown)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "normalize": normalize,
            "measure_steps": measure_steps,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "state_dtype": _dtype_name(state_dtype),
            "stochastic_rounding": stochastic_rounding,
            # Of a group of LoRA factors, which hf_sai.param_groups makes; see hf_sai/optim/lora_pairs.py.
            "paired": lora_policy == "paired",
            "lora_policy": lora_policy,
            # Not options, but they decide updates and so live where state_dict() saves them.
            **SHARED,
        }
        defaults = from_text(defaults, _FROM_TEXT)
        _check_options(defaults)
        super().__init__(params, defaults)
        if gsnr is not None:
            self._take_given(list(gsnr))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Adds a group, in the middle of training too: its tensors are pending, and share the step and the maximum.

        Args:
            param_group (`dict`): `"params"` and the options that differ from the defaults.

        Raises:
            `ValueError`: An option is out of its range, or `normalize` differs from the other groups'.
        """
        first = self.param_groups[0] if self.param_groups else self.defaults
        param_group = from_text(param_group, _FROM_TEXT)
        merged = {**self.defaults, **param_group}
        merged["state_dtype"] = _dtype_name(merged["state_dtype"])
        _check_options(merged)
        if merged["normalize"] != first["normalize"]:
            raise ValueError(
                f"normalize must be the same in all parameter groups but is {merged['normalize']!r} beside "
                f"{first['normalize']!r}; what divides is taken over the whole model, so set it once"
            )
        shared = {key: first[key] for key in SHARED}
        shared["params"] = self._with_names(param_group["params"])
        if merged["paired"]:
            shared["lora_policy"] = "paired"
            check_pairs([each[1] if isinstance(each, tuple) else each for each in shared["params"]])
        super().add_param_group({**param_group, "state_dtype": merged["state_dtype"], **shared})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A state of before groups held the policy.
        policy = "paired" if any(group.get("paired") for group in state["param_groups"]) else "plain"
        for group in state["param_groups"]:
            group.setdefault("lora_policy", policy)
            if group.get("state_dtype") == "float16":  # older states had it; their buffers are widened
                group["state_dtype"] = "float32"
        super().__setstate__(state)

    def _begin(self) -> None:
        """Measures what is not settled."""
        unsettled = self._collect(self._params())
        moments = self._moments(unsettled)
        self._count_step(moments)
        self._first, self._skipped = self._measure(unsettled, moments, self.param_groups[0]["step"])
        if unsettled:
            self._update_divisors(unsettled, moments)
            self._warn_if_bf16_stays(unsettled, moments, self._first)

    def _move(self, places: Iterable[tuple[int, int, Tensor]]) -> None:
        """Updates those of some tensors that have a gradient."""
        normalizer = self._normalizer()
        for group_index, some in itertools.groupby(places, key=lambda place: place[0]):
            params = (param for _, _, param in some)
            self._update(self.param_groups[group_index], params, normalizer, self._first, self._skipped)

    def _refuse_pieces(self) -> None:
        if any(group["paired"] for group in self._every_group()):
            raise ZeroLayoutError(
                "SGDSaI with lora_policy='paired' needs whole factors, but DeepSpeed ZeRO hands over pieces; use DDP "
                "or DeepSpeed's stage 0, or leave lora_policy out"
            )

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        check_writer("SGDSaI", state_dict)

    def _loaded_dtype(self, key: str, saved: Tensor, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        """
        A buffer keeps the dtype that `state_dtype` asks for, or that has more digits than the parameter's. A bf16
        checkpoint loaded into float32 parameters is widened.
        """
        if key != "momentum_buffer":
            return saved.dtype
        if _dtype_name(saved.dtype) == group.get("state_dtype") != "float16":
            return saved.dtype
        return buffer_dtype(torch.promote_types(saved.dtype, param.dtype))

    def extra_bytes(self) -> int:
        """The most that an update needs for a while: float32 copies, a block at a time."""
        found = 0
        for group_index, _, param in self._params():
            kept = self.param_groups[group_index]["state_dtype"]
            dtypes = (param.dtype, param.dtype, STATE_DTYPES[kept] if kept else buffer_dtype(param.dtype))
            narrow = sum(dtype != torch.float32 for dtype in dtypes)
            found = max(found, narrow * 4 * min(param.numel(), BLOCK_NUMEL))
        return found

    def _new_state(self, group_index: int, index: int) -> dict[str, Any]:
        state = super()._new_state(group_index, index)
        return {**state, "pair_norm": 0.0} if self.param_groups[group_index]["paired"] else state

    def _first_factor(self, group_index: int, index: int, state: dict[str, Any]) -> float:
        norm = state.get("pair_norm", 0.0)  # 0.0 until the pair has had a gradient
        return first_factor(norm, state.get("gradient_norm", 0.0), is_a=index % 2 == 0) if norm else 1.0

    def _make_state(self, group_index: int, index: int, param: Tensor) -> None:
        super()._make_state(group_index, index, param)
        if self.param_groups[group_index]["momentum"] != 0:
            self._add_buffer(self.param_groups[group_index], param)

    def _add_buffer(self, group: dict[str, Any], param: Tensor) -> None:
        dtype = STATE_DTYPES[group["state_dtype"]] if group["state_dtype"] else buffer_dtype(param.dtype)
        buffer = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        self.state[param].update(momentum_buffer=buffer, decay_ratio=_NOT_BEGUN, decay=0.0)

    def _update(
        self,
        group: dict[str, Any],
        params: Iterable[Tensor],
        normalizer: float,
        first: set[Tensor],
        skipped: set[Tensor],
    ) -> None:
        """Updates tensors of a group."""
        options = (group["maximize"], group["stochastic_rounding"])
        ready = [each for each in params if each.grad is not None and not (skipped and each in skipped)]
        before: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        found = self._find_not_finite(
            [gradient_of(param) for param in ready],
            lambda index: self._name_in(group, ready[index]),
            lambda index: functools.partial(self._put_back, *before.setdefault(index, (ready[index], {}))),
        )
        paired = self._paired_gradients(group) if group["paired"] else {}
        # By what a tensor can need: an update without momentum, a buffer that starts, a buffer that goes on.
        plain, starting, moving = (Batch(weight, *options) for weight in (1.0, 1.0, 1.0 - group["momentum"]))
        for index, param in enumerate(ready):
            if index in found.bad:
                continue
            state = self.state[param]
            if index in before:
                kept = {key: state[key] for key in _OF_BUFFER if key in state}
                if isinstance(kept.get("decay"), Tensor):  # which is written in place
                    kept["decay"] = kept["decay"].clone()
                before[index][1].update(kept)
            scale = state["gsnr"] / normalizer
            batch = moving if scale and group["momentum"] else plain
            if batch is moving:
                if "momentum_buffer" not in state:  # momentum was switched on after the first step
                    self._add_buffer(group, param)
                if state["decay_ratio"] == _NOT_BEGUN or (first and param in first):
                    batch = starting  # m_1 = g_1
                batch.buffers.append(local(state["momentum_buffer"]))
            elif state.get("decay_ratio", 0.0) > 0.0:
                _unfold_decay(state, param)
            batch.params.append(local(param))
            batch.grads.append(paired[param] if param in paired else local(gradient_of(param)))
            batch.coefficients.append(next_coefficients(group, state, scale, starts=batch is starting))
            if index in found.on_device:
                batch.found.append(found.on_device[index])
        for batch in (plain, starting, moving):
            if batch.params:
                update(batch, group["foreach"], group["fused"])

    def _name_in(self, group: dict[str, Any], param: Tensor) -> str:
        group_index = next(index for index, each in enumerate(self.param_groups) if each is group)
        return self._name(group_index, next(index for index, each in enumerate(group["params"]) if each is param))

    def _put_back(self, param: Tensor, before: dict[str, Any]) -> None:
        """Gives a tensor the plain values of before a step that its update did not make; a buffer that began goes."""
        state = self.state[param]
        for key in _OF_BUFFER:
            state.pop(key, None)
        state.update(before)

    def _paired_gradients(self, group: dict[str, Any]) -> dict[Tensor, Tensor]:
        """The gradients of LoRA's factors, bounded by the norm of each pair's first, which is kept."""
        found: dict[Tensor, Tensor] = {}
        for pair in zip(group["params"][::2], group["params"][1::2], strict=True):
            if any(is_sharded(param) for param in pair):
                raise RuntimeError(
                    "SGDSaI with lora_policy='paired' needs whole factors, but they are sharded; use DDP, keep the "
                    "adapter out of FSDP's sharding, or leave lora_policy out"
                )
            states = [state for param in pair if (state := self.state.get(param))]  # none of a frozen factor
            norm = max((state["pair_norm"] for state in states), default=0.0)
            if not norm:
                norms = [norm_of(param.grad) for param in pair if param.grad is not None]
                norm = max((each for each in norms if math.isfinite(each)), default=0.0)
                if not norm:
                    continue  # all are zero, or not finite: none is moved by its gradient
                if all(map(math.isfinite, norms)):  # else the other factor is bounded by itself, and the pair waits
                    for state in states:
                        state["pair_norm"] = norm
            for index, param in enumerate(pair):
                if param.grad is not None:
                    found[param] = bounded(param.grad, norm, is_a=index == 0)
        return found

    def _moved_norm(self, group_index: int, index: int, moments: GradientMoments) -> float:
        """Of a LoRA factor that is trained as one of a pair: its gradient's, bounded."""
        group = self.param_groups[group_index]
        if not group["paired"]:
            return moments.norm
        param, other = group["params"][index], group["params"][index ^ 1]
        norm = self.state[param]["pair_norm"]
        if not norm:
            others = norm_of(other.grad) if other.grad is not None else 0.0
            norm = max(moments.norm, others) if math.isfinite(others) else moments.norm  # as _paired_gradients has it
        return moments.norm * first_factor(norm, moments.norm, is_a=index % 2 == 0)

    def _warn_if_bf16_stays(
        self, unsettled: list[tuple[int, int, Tensor]], moments: list[GradientMoments], first: set[Tensor]
    ) -> None:
        """One warning where bf16 parameters would be moved by less than they resolve, at the peak learning rate."""
        if self.__dict__.get("_warned_bf16"):
            return
        bf16 = [
            (group, self._name(group, index), param, moment)
            for (group, index, param), moment in zip(unsettled, moments, strict=True)
            if param in first and param.dtype == torch.bfloat16 and not self.param_groups[group]["stochastic_rounding"]
        ]
        stuck = []
        normalizer = self._normalizer()
        for group, name, param, moment in bf16:
            size = self.state[param]["weight_rms"] * math.sqrt(param.numel())
            peak = float(self.param_groups[group].get("initial_lr", self.param_groups[group]["lr"]))
            norm = 1.0 if self.param_groups[group]["paired"] else moment.norm
            move = peak * self.state[param]["gsnr"] / normalizer * norm
            if 0.0 < move < BF16_RESOLUTION * size:
                stuck.append((move / size, name))
        if stuck:
            self.__dict__["_warned_bf16"] = True
            logger.warning(
                "%d of %d bf16 parameters move by less than 2^-8 of their size in a step (%s: %.1e), so that most of "
                "it is rounded away: set stochastic_rounding=True, keep the parameters in float32, or raise the "
                "learning rate.",
                len(stuck),
                len(bf16),
                min(stuck)[1],
                min(stuck)[0],
            )


# What a tensor's state has because of its momentum buffer.
_OF_BUFFER = ("momentum_buffer", "decay_ratio", "decay")
# The `decay_ratio` of a buffer that holds no gradient yet.
_NOT_BEGUN = -1.0


def _unfold_decay(state: dict[str, Any], param: Tensor) -> None:
    """
    Leaves the plain `m` in a buffer that waits while momentum is 0: `M = m + c p` holds for the `p` of before the last
    step, which is `p + s M` now (see `hf_sai/optim/sgd_update.py`).
    """
    buffer, ratio, decay = local(state["momentum_buffer"]), state["decay_ratio"], state["decay"]
    wide = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
    buffer.copy_(wide * (1.0 - decay) - local(param).to(wide.dtype) * ratio)
    state["decay_ratio"] = 0.0
    state["decay"] = torch.zeros_like(decay) if isinstance(decay, Tensor) else 0.0


def _dtype_name(dtype: Any) -> Any:
    """`torch.bfloat16` as `"bfloat16"`: a group holds plain values."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


_FROM_TEXT = {
    **dict.fromkeys(("lr", "momentum", "weight_decay", "eps"), to_float),
    **dict.fromkeys(("foreach", "fused"), or_none(to_bool)),
    "normalize": one_of(*NORMALIZATIONS),
    "measure_steps": to_int,
    "state_dtype": or_none(one_of(*STATE_DTYPES)),
    "lora_policy": one_of(*PAIR_POLICIES),
}


def _check_options(options: dict[str, Any]) -> None:
    """Raises `ValueError` for the first option that is out of its range."""
    for name in ("lr", "weight_decay", "eps"):
        check_number(name, options[name], "give a number such as 0.01")
    check_share("momentum", options["momentum"], "the paper uses 0.9")
    learning_rate = "choose one (the learning rate depends on it)"
    check_choice("normalize", options["normalize"], NORMALIZATIONS, learning_rate)
    check_choice("lora_policy", options["lora_policy"], PAIR_POLICIES)
    check_whole("measure_steps", options["measure_steps"], "the paper uses 1")
    for name in ("maximize", "stochastic_rounding"):
        check_flag(name, options[name])
    for name in ("foreach", "fused"):
        check_flag(name, options[name], optional=True)
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused must not both be True, but they are; set one, or none to let it choose")
    kept = "None keeps the parameter's"
    if options["state_dtype"] == "float16":
        kept = "float16 loses gradients below 1e-7 and above 65504, bfloat16 takes as little memory"
    check_choice("state_dtype", options["state_dtype"], STATE_DTYPES, kept, optional=True)
