"""
SGD-SaI: momentum SGD whose per-tensor learning-rate scale is measured once, at the first step.

Source: arXiv 2412.11768, Algorithm 1; the authors' package `sgd-sai` 1.0.3 where the two differ (`normalize`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import check_writer
from .checks import check_choice, check_flag, check_number, check_share, check_whole
from .gsnr import NORMALIZATIONS, GradientMoments, gradient_moments
from .lora_pairs import PAIR_POLICIES, bounded, check_pairs, norms
from .scales import MeasuredScales
from .sgd_batch import Batch, next_coefficients
from .sgd_update import update
from .tensors import BLOCK_NUMEL, gradient_of, is_sharded, local, low_precision


logger = logging.getLogger(__name__)

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A bf16 number has 8 bits of mantissa: a change below half of 2^-8 of it is rounded away.
BF16_RESOLUTION = 2.0**-8


class SGDSaI(MeasuredScales):
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
    it never sets the maximum. (While nothing but fallbacks was seen, the largest of them divides under `"max"`.)

    A learning rate means nothing without `normalize`: the two variants differ by the largest g-SNR of the model, some
    500 times on a tiny GPT-2 and 6,000 times on GPT-2.

    State per tensor: `gsnr` (float), `gsnr_step` and `gsnr_count` (int), `gsnr_fallback` and `gsnr_given` (bool), and
    where `momentum` is not 0 `momentum_buffer` (parameter's shape), `buffer_scale`, `decay_ratio` and `decay` (float):
    half of AdamW's. The buffer holds `g_snr * m_t` and a multiple of `theta_{t-1}`, by which a group is updated by one
    call and decoupled decay needs no pass over memory of its own (derived in `hf_sai/optim/sgd_batch.py`); so it
    belongs to the parameters it was saved with. In fp16 `g_snr * m_t` has to stay below 65504. With `kahan_sum`
    `rounding_error` (parameter's shape and dtype).
    State is made for every trainable tensor in the first `step()`, so that its keys depend neither on which gradients
    came nor on parameters that a sharding library replaces after construction. `state_dict()` holds plain values and
    tensors only.

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
            that steps after the measuring ones can be captured in a CUDA graph.
        momentum (`float`, *optional*, defaults to 0.9):
            Decay of the momentum buffer, in [0, 1). 0 keeps no buffer.
        weight_decay (`float`, *optional*, defaults to 1e-2):
            Decoupled decay: `theta` shrinks by `lr * weight_decay`, without `scale`. Never part of the gradient.
        eps (`float`, *optional*, defaults to 1e-8):
            Added to the standard deviation, in units of the gradient. g-SNR never falls below `sqrt(n - 1)` by it.
        normalize (`str`, *optional*, defaults to `"none"`):
            `"none"` or `"max"`, one for all groups. The maximum is taken over all groups and fixed at the end of the
            first step that measured (of the first `measure_steps` such steps), and stays for tensors measured later.
        measure_steps (`int`, *optional*, defaults to 1):
            g-SNR is the mean over this many first informative gradients of each tensor. 1 is the paper.
        maximize (`bool`, *optional*, defaults to `False`):
            Ascend instead of descend. `p.grad` is not written.
        foreach (`bool`, *optional*):
            Whether to update lists of tensors at once. `None`: for small tensors on accelerators.
        fused (`bool`, *optional*):
            Whether to touch memory once per element. `None`: with torch's ready-made kernel, in float32 and float64 on
            CPU, and in all dtypes on CUDA, where small tensors share a call. `True`: compiles a kernel for low
            precision on the CPU, which takes 10 to 20 s in the second step; where that can't be done, one warning, and
            the plain path. The result is the same up to rounding.
        state_dtype (`str` or `torch.dtype`, *optional*):
            Of the momentum buffer: `"float32"`, `"bfloat16"` or `"float16"`. `None`: the parameter's.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Rounds bf16 parameters at random instead of to the nearest, so that updates below their resolution are not
            lost. The noise has a generator of its own, seeded by the step: replicas stay equal, a resumed run goes on
            as it would have, and the global random numbers are left alone. Not inside a CUDA graph.
        kahan_sum (`bool`, *optional*, defaults to `False`):
            Keeps what rounding bf16 and fp16 parameters loses, and adds it in the next step (Kahan summation): close
            to float32 parameters, for 2 bytes of state more per element. Not beside `stochastic_rounding`.
        gsnr (iterable of rows, *optional*):
            Scales of another run instead of measuring: `report.tensors` or `gsnr_statistics()`. Parameters need names,
            the same as the rows'. A row that is pending is measured as usual.

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
        normalize: Literal["none", "max"] = "none",
        measure_steps: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        state_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool = False,
        kahan_sum: bool = False,
        gsnr: Iterable[Any] | None = None,
    ) -> None:
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
            "kahan_sum": kahan_sum,
            # Of a group of LoRA factors, which hf_sai.param_groups makes; see hf_sai/optim/lora_pairs.py.
            "paired": False,
            "lora_policy": "plain",
            # Not options, but they decide updates and so live where state_dict() saves them. Equal in every group.
            "step": 0,
            "gsnr_max": 0.0,
            "gsnr_max_step": 0,  # step that fixed the maximum; -1 where it was given
        }
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
        merged = {**self.defaults, **param_group}
        merged["state_dtype"] = _dtype_name(merged["state_dtype"])
        _check_options(merged)
        if merged["normalize"] != first["normalize"]:
            raise ValueError(
                f"normalize must be the same in all parameter groups but is {merged['normalize']!r} beside "
                f"{first['normalize']!r}; the maximum is taken over the whole model, so set it once"
            )
        shared = {key: first[key] for key in ("step", "gsnr_max", "gsnr_max_step")}
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
        super().__setstate__(state)

    def _advance(self) -> None:
        """Measures what is not settled, and updates every tensor that has a gradient."""
        unsettled = self._collect(self._params())
        moments = gradient_moments([gradient_of(param) for _, _, param in unsettled])
        self._count_step(moments)
        first, skipped = self._measure(unsettled, moments, self.param_groups[0]["step"])
        if unsettled:
            self._update_max()
            self._warn_if_bf16_stays(unsettled, moments, first)
        normalizer = self._normalizer()
        for group in self.param_groups:
            self._update(group, group["params"], normalizer, first, skipped)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Loads what `state_dict()` gave, each momentum buffer in the dtype that it was saved in.

        Raises:
            `ValueError`: The state was written by another optimizer.
        """
        check_writer("SGDSaI", state_dict)
        self._warn_of_other_options(state_dict["param_groups"])
        super().load_state_dict(state_dict)
        self._restore_buffers(state_dict)

    def extra_bytes(self) -> int:
        """The most that an update needs for a while: float32 copies, a block at a time."""
        found = 0
        for group_index, _, param in self._params():
            kept = self.param_groups[group_index]["state_dtype"]
            dtypes = (param.dtype, param.dtype, STATE_DTYPES[kept] if kept else param.dtype)
            narrow = sum(dtype != torch.float32 for dtype in dtypes)
            found = max(found, narrow * 4 * min(param.numel(), BLOCK_NUMEL))
        return found

    def _restore_buffers(self, state_dict: dict[str, Any]) -> None:
        """
        Undoes the cast to the parameter's dtype in `torch.optim.Optimizer.load_state_dict` where it lost digits, or
        where `state_dtype` asks for what was saved. A bf16 checkpoint loaded into float32 parameters stays widened.
        """
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for saved_id, (group_index, _, param) in zip(saved_ids, self._params(), strict=True):
            saved_state = state_dict["state"].get(saved_id, {})
            if isinstance(saved_state.get("decay"), Tensor):  # of a version before 0.2
                self.state[param]["decay"] = float(saved_state["decay"])
            saved = saved_state.get("momentum_buffer")
            if saved is None or saved.dtype == param.dtype:
                continue
            asked_for = _dtype_name(saved.dtype) == self.param_groups[group_index]["state_dtype"]
            if asked_for or torch.promote_types(saved.dtype, param.dtype) == saved.dtype:
                self.state[param]["momentum_buffer"] = saved.to(device=param.device, copy=True)

    def _new_state(self, group_index: int, index: int) -> dict[str, Any]:
        state = super()._new_state(group_index, index)
        return {**state, "pair_norm": 0.0} if self.param_groups[group_index]["paired"] else state

    def _make_state(self, group_index: int, index: int, param: Tensor) -> None:
        super()._make_state(group_index, index, param)
        group = self.param_groups[group_index]
        if group["momentum"] != 0:
            self._add_buffer(group, param)
        if group["kahan_sum"] and low_precision(param.dtype):
            self.state[param]["rounding_error"] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def _add_buffer(self, group: dict[str, Any], param: Tensor) -> None:
        dtype = STATE_DTYPES[group["state_dtype"]] if group["state_dtype"] else param.dtype
        buffer = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
        self.__dict__.setdefault("_not_zeroed", []).append(local(buffer))
        self.state[param].update(momentum_buffer=buffer, buffer_scale=0.0, decay_ratio=0.0, decay=0.0)

    def _zero_new_buffers(self) -> None:
        """All together: one by one they would be most of the first step's launches. Comes before any update."""
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for buffer in self.__dict__.pop("_not_zeroed", []):
            alike.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        for buffers in alike.values():
            torch._foreach_zero_(buffers)

    def _update(
        self,
        group: dict[str, Any],
        params: Iterable[Tensor],
        normalizer: float,
        first: set[Tensor],
        skipped: set[Tensor],
    ) -> None:
        """Updates tensors of a group."""
        self._zero_new_buffers()
        paired = self._paired_gradients(group) if group["paired"] else {}
        step = group["lr"].detach() if isinstance(group["lr"], Tensor) else float(group["lr"])
        step = step / normalizer if normalizer != 1.0 else step
        momentum, rounding = group["momentum"], group["stochastic_rounding"] or group["kahan_sum"]
        batches: dict[Any, Batch] = {}
        for param in params:
            if param.grad is None or (skipped and param in skipped):
                continue
            state = self.state[param]
            moving = bool(state["gsnr"] and momentum)
            starts = moving and bool(first) and param in first  # m_1 = g_1
            if moving and "momentum_buffer" not in state:  # momentum was switched on after the first step
                self._add_buffer(group, param)
                self._zero_new_buffers()
                starts = True
            error = state.get("rounding_error") if rounding else None
            # Pieces differ in size from rank to rank, and so does what noise they take.
            key = (moving, error is not None, is_sharded(param)) if rounding else moving
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = Batch(group["maximize"], self._rounding(group))
            if moving:
                batch.buffers.append(local(state["momentum_buffer"]))
            if error is not None:
                batch.errors.append(local(error))
            batch.params.append(local(param))
            batch.grads.append(paired[param] if paired and param in paired else local(gradient_of(param)))
            batch.coefficients.append(next_coefficients(group, state, step, normalizer, starts))
        for batch in batches.values():
            update(batch, group["foreach"], group["fused"])

    def _paired_gradients(self, group: dict[str, Any]) -> dict[Tensor, Tensor]:
        """The gradients of LoRA's factors, bounded by the norm of each pair's first, which is kept."""
        pairs = list(zip(group["params"][::2], group["params"][1::2], strict=True))
        if any(is_sharded(param) for pair in pairs for param in pair):
            raise RuntimeError(
                "SGDSaI with lora_policy='paired' needs whole factors, but they are sharded; use DDP, keep the "
                "adapter out of FSDP's sharding, or leave lora_policy out"
            )
        # None of a frozen factor.
        states = [[state for param in pair if (state := self.state.get(param))] for pair in pairs]
        new = [
            index for index, pair in enumerate(states) if not max((state["pair_norm"] for state in pair), default=0.0)
        ]
        present = [(index, param.grad) for index in new for param in pairs[index] if param.grad is not None]
        largest: dict[int, float] = {}
        for (index, _), norm in zip(present, norms([grad for _, grad in present]), strict=True):
            largest[index] = max(norm, largest.get(index, 0.0))
        for index, norm in largest.items():
            if 0.0 < norm < math.inf:
                for state in states[index]:
                    state["pair_norm"] = norm
        rows = [
            (param, param.grad, pair_states[0]["pair_norm"], position == 0)
            for pair, pair_states in zip(pairs, states, strict=True)
            # Without a norm nothing is known of the pair yet, and it is not moved.
            if pair_states and pair_states[0]["pair_norm"]
            for position, param in enumerate(pair)
            if param.grad is not None
        ]
        return dict(zip([row[0] for row in rows], bounded([row[1:] for row in rows]), strict=True))

    def _warn_if_bf16_stays(
        self, unsettled: list[tuple[int, int, Tensor]], moments: list[GradientMoments], first: set[Tensor]
    ) -> None:
        """One warning where bf16 parameters would be moved by less than they resolve, at the peak learning rate."""
        if self.__dict__.get("_warned_bf16"):
            return
        bf16 = [
            (group, self._name(group, index), param, moment)
            for (group, index, param), moment in zip(unsettled, moments, strict=True)
            if param in first and param.dtype == torch.bfloat16 and _loses_digits(self.param_groups[group])
        ]
        stuck = []
        normalizer = self._normalizer()
        # Read once per group: each may be a tensor on a device.
        peaks = {group: _peak(self.param_groups[group]) for group in {row[0] for row in bf16}}
        for (group, name, param, moment), values in zip(
            bf16, gradient_moments([param.detach() for _, _, param, _ in bf16]), strict=True
        ):
            norm = 1.0 if self.param_groups[group]["paired"] else moment.norm
            move = peaks[group] * self.state[param]["gsnr"] / normalizer * norm
            if 0.0 < move < BF16_RESOLUTION * values.norm:
                stuck.append((move / values.norm, name))
        if stuck:
            self.__dict__["_warned_bf16"] = True
            logger.warning(
                "%d of %d bf16 parameters move by less than 2^-8 of their size in a step (%s: %.1e), so that most of "
                "it is rounded away: set kahan_sum=True or stochastic_rounding=True, keep the parameters in float32, "
                "or raise the learning rate.",
                len(stuck),
                len(bf16),
                min(stuck)[1],
                min(stuck)[0],
            )


def _loses_digits(group: dict[str, Any]) -> bool:
    """Whether what is below the resolution of bf16 parameters is lost."""
    return not (group["stochastic_rounding"] or group["kahan_sum"])


def _peak(group: dict[str, Any]) -> float:
    """The learning rate that a schedule starts from, or the present one."""
    return float(group.get("initial_lr", group["lr"]))


def _dtype_name(dtype: Any) -> Any:
    """`torch.bfloat16` as `"bfloat16"`: a group holds plain values."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _check_options(options: dict[str, Any]) -> None:
    """Raises `ValueError` for the first option that is out of its range."""
    for name in ("lr", "weight_decay", "eps"):
        check_number(name, options[name], "give a number such as 0.01")
    check_share("momentum", options["momentum"], "the paper uses 0.9")
    learning_rate = "choose one (the learning rate depends on it)"
    check_choice("normalize", options["normalize"], NORMALIZATIONS, learning_rate)
    check_choice("lora_policy", options["lora_policy"], PAIR_POLICIES)
    check_whole("measure_steps", options["measure_steps"], "the paper uses 1")
    for name in ("maximize", "stochastic_rounding", "kahan_sum"):
        check_flag(name, options[name])
    if options["stochastic_rounding"] and options["kahan_sum"]:
        raise ValueError(
            "stochastic_rounding and kahan_sum must not both be True, but they are; kahan_sum is the more exact one, "
            "stochastic_rounding the one without state"
        )
    for name in ("foreach", "fused"):
        check_flag(name, options[name], optional=True)
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused must not both be True, but they are; set one, or none to let it choose")
    check_choice("state_dtype", options["state_dtype"], STATE_DTYPES, "None keeps the parameter's", optional=True)
