"""
SGD-SaI: momentum SGD whose per-tensor learning-rate scale is measured once, at the first step.

Source: arXiv 2412.11768, Algorithm 1; the authors' package `sgd-sai` 1.0.3 where the two differ (`normalize`).
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import check_writer
from .checks import from_text, refuse_unknown
from .gsnr import GradientMoments
from .lora_pairs import bounded_pairs, check_pairs, finite_norms, first_factor
from .scales import SHARED, MeasuredScales
from .sgd_batch import Batch, next_coefficients
from .sgd_options import FROM_TEXT, SAVED_KEYS, STATE_DTYPES, check_options, dtype_name, rows_in
from .sgd_update import update
from .stall import loses_digits, peak_rate, warn_of_stall
from .tensors import BLOCK_NUMEL, buffer_dtype, gradient_of, is_sharded, local, low_precision
from .zero_layout import ZeroLayoutError


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
    any step, with one warning. On an accelerator, where the host does not wait to be told, the tensors of a group
    share a call and so its fate: none of them moves in that step, and the warning comes in the next one. To know costs
    a pass over the gradients, but not where `torch.nn.utils.clip_grad_norm_` has found their norm finite. LoRA's `A`,
    whose gradient is zero at step 1 because `B` is zero, is measured at the first step after `B` moved and trains; the
    published implementations freeze it. A tensor of one element, or whose gradient is constant to the precision of its
    dtype, has no standard deviation: its g-SNR is `sqrt(n)`, marked as fallback, and it never sets the maximum. (While
    nothing but fallbacks was seen, the largest of them divides under `"max"`.)

    A learning rate means nothing without `normalize`: the two variants differ by the largest g-SNR of the model, some
    500 times on a tiny GPT-2 and 6,000 times on GPT-2.

    State per tensor: `gsnr` (float), `gsnr_step` and `gsnr_count` (int), `gsnr_fallback` and `gsnr_given` (bool);
    `gradient_norm` and `weight_rms` (float) as they were at the first informative gradient, for the report; and where
    `momentum` is not 0 `momentum_buffer` (parameter's shape), `buffer_scale`, `decay_ratio` and `decay` (float): half
    of AdamW's. The buffer holds `g_snr * m_t` and a multiple of `theta_{t-1}`, by which a group is updated by one call
    and decoupled decay needs no pass over memory of its own (derived in `hf_sai/optim/sgd_batch.py`); so it belongs to
    the parameters it was saved with. With `kahan_sum` `rounding_error` (parameter's shape and dtype). State is made
    for every trainable tensor in the first `step()`, so that its keys depend neither on which gradients came nor on
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
            that steps after the measuring ones can be captured in a CUDA graph.
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
            has, so that AdamW's learning rate is the place to start where a whole model is trained. Nothing bounds
            later updates, so that adapters need `lora_policy="paired"` (docs/learning-rates.md).
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
            Of the momentum buffer: `"float32"` or `"bfloat16"`. `None`: the parameter's, but float32 for float16
            parameters: the buffer has the gradient's unit, and float16 loses gradients below 1e-7 and above 65504.
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
        kahan_sum: bool = False,
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
            "state_dtype": dtype_name(state_dtype),
            "stochastic_rounding": stochastic_rounding,
            "kahan_sum": kahan_sum,
            # Of a group of LoRA factors, which hf_sai.param_groups makes; see hf_sai/optim/lora_pairs.py.
            "lora_policy": lora_policy,
            # Not options, but they decide updates and so live where state_dict() saves them.
            **SHARED,
        }
        defaults = from_text(defaults, FROM_TEXT)
        defaults["paired"] = defaults["lora_policy"] == "paired"
        check_options(defaults)
        rows = rows_in(gsnr)
        super().__init__(params, defaults)
        if rows is not None:
            self._take_given(rows)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Adds a group, in the middle of training too: its tensors are pending, and share the step and the maximum.

        Args:
            param_group (`dict`): `"params"` and the options that differ from the defaults.

        Raises:
            `ValueError`: An option is out of its range, or `normalize` differs from the other groups'.
        """
        first = self.param_groups[0] if self.param_groups else self.defaults
        param_group = from_text(param_group, FROM_TEXT)
        merged = {**self.defaults, **param_group}
        merged["state_dtype"] = dtype_name(merged["state_dtype"])
        check_options(merged)
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
        for values in state["state"].values():
            if isinstance(values.get("decay"), Tensor):  # of before 0.2, with a learning rate on a device
                values["decay"] = float(values["decay"])
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
        for group_index, some in itertools.groupby(places, key=operator.itemgetter(0)):
            params = [param for _, _, param in some]
            self._update(self.param_groups[group_index], params, normalizer, self._first, self._skipped)

    def _refuse_pieces(self) -> None:
        if any(group["paired"] for group in self._every_group()):
            raise ZeroLayoutError(
                "SGDSaI with lora_policy='paired' needs whole factors, but DeepSpeed ZeRO hands over pieces; use DDP "
                "or DeepSpeed's stage 0, or leave lora_policy out"
            )

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        check_writer("SGDSaI", SAVED_KEYS, state_dict)

    def _loaded_dtype(self, key: str, saved: Tensor, param: Tensor, group: dict[str, Any]) -> torch.dtype:
        """
        A buffer keeps the dtype that `state_dtype` asks for, or that has more digits than the parameter's. A bf16
        checkpoint loaded into float32 parameters is widened.
        """
        if key != "momentum_buffer":
            return param.dtype if key == "rounding_error" else saved.dtype
        if dtype_name(saved.dtype) == group.get("state_dtype") != "float16":
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

    def _collect(self, params: Iterable[tuple[int, int, Tensor]]) -> list[tuple[int, int, Tensor]]:
        """Zeroes new buffers together: one by one they would be most of the first step's launches."""
        self.__dict__["_not_zeroed"] = []
        try:
            return super()._collect(params)
        finally:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for buffer in self.__dict__.pop("_not_zeroed"):
                alike.setdefault((buffer.device, buffer.dtype), []).append(buffer)
            for buffers in alike.values():
                torch._foreach_zero_(buffers)

    def _make_state(self, group_index: int, index: int, param: Tensor) -> None:
        super()._make_state(group_index, index, param)
        group = self.param_groups[group_index]
        if group["momentum"] != 0:
            self._add_buffer(group, param)
        if _keeps_errors(group, param):
            self.state[param]["rounding_error"] = self._zeros(param, param.dtype)

    def _add_buffer(self, group: dict[str, Any], param: Tensor) -> None:
        dtype = STATE_DTYPES[group["state_dtype"]] if group["state_dtype"] else buffer_dtype(param.dtype)
        buffer = self._zeros(param, dtype)
        self.state[param].update(momentum_buffer=buffer, buffer_scale=0.0, decay_ratio=_NOT_BEGUN, decay=0.0)

    def _zeros(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        zeroed_later: list[Tensor] | None = self.__dict__.get("_not_zeroed")
        make = torch.zeros_like if zeroed_later is None else torch.empty_like
        made = make(param, dtype=dtype, memory_format=torch.preserve_format)
        if zeroed_later is not None:
            zeroed_later.append(local(made))
        return made

    def _update(
        self,
        group: dict[str, Any],
        params: Iterable[Tensor],
        normalizer: float,
        first: set[Tensor],
        skipped: set[Tensor],
    ) -> None:
        """Updates tensors of a group."""
        momentum = group["momentum"]
        ready = [each for each in params if each.grad is not None and not (skipped and each in skipped)]
        grads = [gradient_of(param) for param in ready]
        before: dict[int, dict[str, Any]] = {}
        found = self._find_not_finite(
            grads,
            lambda index: self._name_in(group, ready[index]),
            lambda indices: functools.partial(self._put_back, [(ready[i], before.setdefault(i, {})) for i in indices]),
        )
        paired = self._paired_gradients(group) if group["paired"] else {}
        step = group["lr"].detach().reshape(()) if isinstance(group["lr"], Tensor) else float(group["lr"])
        step = step / normalizer if normalizer != 1.0 else step
        rounds = group["stochastic_rounding"] or group["kahan_sum"]
        batches: dict[Any, Batch] = {}
        states, bad, flags = self.state, found.bad, found.on_device
        for index, param in enumerate(ready):
            if index in bad:
                continue
            state, flag = states[param], flags.get(index)
            moving = bool(momentum and state["gsnr"])
            if not moving and state.get("decay_ratio", 0.0) > 0.0:
                _unfold_decay(state, param)
            if flag is not None:
                before[index].update({key: state[key] for key in _OF_BUFFER if key in state})
            if moving and "momentum_buffer" not in state:  # momentum was switched on after the first step
                self._add_buffer(group, param)
            starts = moving and (state["decay_ratio"] == _NOT_BEGUN or (bool(first) and param in first))  # m_1 = g_1
            grad = paired[param] if paired and param in paired else local(grads[index])
            buffer = local(state["momentum_buffer"]) if moving else None
            coefficients = next_coefficients(group, state, step, normalizer, starts)
            error = self._error(group, state, param) if rounds else None
            # Pieces differ in size from rank to rank, and so does what noise they take.
            key = (moving, id(flag), error is not None, rounds and is_sharded(param))
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = Batch(group["maximize"], self._rounding(group), found=flag)
            batch.append(local(param), grad, buffer, coefficients, error)
        for batch in batches.values():
            update(batch, group["foreach"], group["fused"])

    def _error(self, group: dict[str, Any], state: dict[str, Any], param: Tensor) -> Tensor | None:
        """What rounding has lost of a parameter so far, where that is kept."""
        if not _keeps_errors(group, param):
            return None
        if "rounding_error" not in state:  # kahan_sum was switched on after the first step
            state["rounding_error"] = self._zeros(param, param.dtype)
        return local(state["rounding_error"])

    def _name_in(self, group: dict[str, Any], param: Tensor) -> str:
        group_index = next(index for index, each in enumerate(self.param_groups) if each is group)
        return self._name(group_index, next(index for index, each in enumerate(group["params"]) if each is param))

    def _put_back(self, rows: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        """Gives tensors the plain values of before a step that a device left out; a buffer that began goes."""
        for param, before in rows:
            state = self.state[param]
            for key in _OF_BUFFER:
                state.pop(key, None)
            state.update(before)

    def _paired_gradients(self, group: dict[str, Any]) -> dict[Tensor, Tensor]:
        """The gradients of LoRA's factors, bounded by the norm of each pair's first, which is kept."""
        if any(is_sharded(param) for param in group["params"]):
            raise RuntimeError(
                "SGDSaI with lora_policy='paired' needs whole factors, but they are sharded; use DDP, keep the "
                "adapter out of FSDP's sharding, or leave lora_policy out"
            )
        return bounded_pairs(list(zip(group["params"][::2], group["params"][1::2], strict=True)), self.state)

    def _moved_norms(self, unsettled: list[tuple[int, int, Tensor]], moments: list[GradientMoments]) -> list[float]:
        """Of a LoRA factor that is trained as one of a pair: its gradient's, bounded."""
        found = super()._moved_norms(unsettled, moments)
        known = {param: norm for (*_, param), norm in zip(unsettled, found, strict=True)}
        waiting = [
            (at, param, index, self.param_groups[group_index]["params"][index ^ 1])
            for at, (group_index, index, param) in enumerate(unsettled)
            if self.param_groups[group_index]["paired"]
        ]
        # A settled factor whose pair waits, as after inf in the other one.
        late = [
            o for _, p, _, o in waiting if not self.state[p]["pair_norm"] and o not in known and o.grad is not None
        ]
        known.update(zip(late, finite_norms([gradient_of(other) for other in late]), strict=True))
        for at, param, index, other in waiting:
            norm = self.state[param]["pair_norm"] or max(known[param], known.get(other, 0.0))
            found[at] *= first_factor(norm, known[param], is_a=index % 2 == 0) if norm else 0.0
        return found

    def _warn_if_bf16_stays(
        self, unsettled: list[tuple[int, int, Tensor]], moments: list[GradientMoments], first: set[Tensor]
    ) -> None:
        """One warning where bf16 parameters would be moved by less than they resolve, at the peak learning rate."""
        if self.__dict__.get("_warned_bf16"):
            return
        bf16 = []  # no comprehension: torch.compile of torch 2.8 can't trace this one
        for (group, index, param), moment in zip(unsettled, moments, strict=True):
            if param in first and param.dtype == torch.bfloat16 and loses_digits(self.param_groups[group]):
                bf16.append((group, self._name(group, index), param, moment))
        # Read once per group: each may be a tensor on a device.
        peaks = {group: peak_rate(self.param_groups[group]) for group in {row[0] for row in bf16}}
        moves, normalizer = [], self._normalizer()
        for group, name, param, moment in bf16:
            norm = 1.0 if self.param_groups[group]["paired"] else moment.norm
            size = self.state[param]["weight_rms"] * math.sqrt(param.numel())
            moves.append((name, peaks[group] * self.state[param]["gsnr"] / normalizer * norm, size))
        self.__dict__["_warned_bf16"] = warn_of_stall(moves)


# What a tensor's state has because of its momentum buffer.
_OF_BUFFER = ("momentum_buffer", "buffer_scale", "decay_ratio", "decay")
# The `decay_ratio` of a buffer that holds no gradient yet.
_NOT_BEGUN = -1.0


def _unfold_decay(state: dict[str, Any], param: Tensor) -> None:
    """
    Leaves `S m` in a buffer that waits while momentum is 0: `N = S m + c p` holds for the `p` of before the last step,
    which is `p + e N` now (see `hf_sai/optim/sgd_batch.py`).
    """
    buffer = local(state["momentum_buffer"])
    wide = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
    buffer.copy_(wide * (1.0 - state["decay"]) - local(param).to(wide.dtype) * state["decay_ratio"])
    state.update(decay_ratio=0.0, decay=0.0)


def _keeps_errors(group: dict[str, Any], param: Tensor) -> bool:
    return group["kahan_sum"] and low_precision(param.dtype)
