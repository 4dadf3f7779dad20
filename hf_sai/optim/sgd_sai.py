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

from .base import NamedOptimizer, check_writer
from .gsnr import (
    NORMALIZATIONS,
    GradientMoments,
    TensorGSNR,
    fallback_snr,
    gradient_moments,
    gradient_snr,
)
from .lora_pairs import bounded, check_pairs, norm_of
from .sgd_update import Batch, Coefficients, update
from .tensors import check_gradient, gradient_of, is_sharded, local


logger = logging.getLogger(__name__)

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A bf16 number has 8 bits of mantissa: a change below half of 2^-8 of it is rounded away.
BF16_RESOLUTION = 2.0**-8


class SGDSaI(NamedOptimizer):
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
    where `momentum` is not 0 `momentum_buffer` (parameter's shape), `decay_ratio` and `decay` (float): half of
    AdamW's. The buffer holds `m_t + weight_decay / scale * theta_{t-1}`, by which decoupled decay needs no pass over
    memory of its own (derived in `hf_sai/optim/sgd_update.py`); so it belongs to the parameters it was saved with.
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
            that steps after the measuring ones can be captured in a CUDA graph; these take the plain path.
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
            Whether to touch memory once per element. `None`: with torch's ready-made kernel, on CPU and for large
            tensors on CUDA, in float32 and float64. `True`: compiles a kernel for low precision too, which takes 10 to
            20 s in the second step; where that can't be done, one warning, and the plain path. The result is the same
            up to rounding.
        state_dtype (`str` or `torch.dtype`, *optional*):
            Of the momentum buffer: `"float32"`, `"bfloat16"` or `"float16"`. `None`: the parameter's.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Rounds bf16 parameters at random instead of to the nearest, so that updates below their resolution are not
            lost. Uses torch's global random numbers.
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
            # Of a group of LoRA factors, which hf_sai.param_groups makes; see hf_sai/optim/lora_pairs.py.
            "paired": False,
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
            check_pairs([each[1] if isinstance(each, tuple) else each for each in shared["params"]])
        super().add_param_group({**param_group, "state_dtype": merged["state_dtype"], **shared})

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

    def gsnr_statistics(self) -> list[TensorGSNR]:
        """
        What has been measured, one row per tensor in the order of the groups. Reads no device memory.

        Returns:
            `list[TensorGSNR]`: Frozen parameters that were never measured are left out.
        """
        rows = []
        normalizer = self._normalizer()
        for group_index, index, param in self._params():
            state = self.state.get(param) or self._new_state(group_index, index)
            if not param.requires_grad and not state["gsnr_step"]:
                continue
            rows.append(
                TensorGSNR(
                    name=self._name(group_index, index),
                    shape=tuple(param.shape),
                    numel=param.numel(),
                    group=group_index,
                    gsnr=state["gsnr"],
                    scale=state["gsnr"] / normalizer,
                    step=state["gsnr_step"],
                    status=_status(state),
                )
            )
        return rows

    @torch.no_grad()
    def measure_now(self) -> dict[str, float]:
        """
        g-SNR of the gradients that are there now, by name, for a look at how it changes; the scales stay.

        A gradient that is zero, constant or not finite is left out. Collective where gradients are sharded.
        """
        there = [place for place in self._params() if place[2].grad is not None]
        moments = gradient_moments([gradient_of(param) for _, _, param in there])
        return {
            self._name(group, index): gradient_snr(moment, self.param_groups[group]["eps"])
            for (group, index, _), moment in zip(there, moments, strict=True)
            if moment.is_finite and not moment.is_zero and not moment.is_constant
        }

    def take_scales(self, rows: Iterable[Any]) -> None:
        """
        Scales to use instead of measuring, as the constructor's `gsnr`; before the first step.

        Args:
            rows (iterable): Such as `measure_gsnr` gives.

        Raises:
            `RuntimeError`: A step was made.
            `ValueError`: The rows do not fit.
        """
        if self.state:
            raise RuntimeError("scales can be given before the first step only, but one was made; pass gsnr= instead")
        self._take_given(list(rows))

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

    def _warn_of_other_options(self, saved_groups: list[dict[str, Any]]) -> None:
        """As in every torch optimizer the saved options replace those of the constructor; here not in silence."""
        names = [name for name in self.defaults if name not in ("lr", "step", "gsnr_max", "gsnr_max_step")]
        changed = {
            f"{name}={saved[name]} (not {group[name]})"
            for group, saved in zip(self.param_groups, saved_groups, strict=False)
            for name in names
            if name in saved and saved[name] != group[name]
        }
        if changed:
            logger.warning("The loaded state goes on with its own options: %s.", ", ".join(sorted(changed)))

    def _restore_buffers(self, state_dict: dict[str, Any]) -> None:
        """
        Undoes the cast to the parameter's dtype in `torch.optim.Optimizer.load_state_dict` where it lost digits, or
        where `state_dtype` asks for what was saved. A bf16 checkpoint loaded into float32 parameters stays widened.
        """
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for saved_id, (group_index, _, param) in zip(saved_ids, self._params(), strict=True):
            saved_state = state_dict["state"].get(saved_id, {})
            if isinstance(saved_state.get("decay"), Tensor):
                self.state[param]["decay"] = saved_state["decay"].to(device=param.device, copy=True)
            saved = saved_state.get("momentum_buffer")
            if saved is None or saved.dtype == param.dtype:
                continue
            asked_for = _dtype_name(saved.dtype) == self.param_groups[group_index]["state_dtype"]
            if asked_for or torch.promote_types(saved.dtype, param.dtype) == saved.dtype:
                self.state[param]["momentum_buffer"] = saved.to(device=param.device, copy=True)

    def _take_given(self, rows: list[Any]) -> None:
        """Keeps the scales of another run in the groups (`gsnr_given`), until the state is made."""
        by_name = {row.name: row for row in rows}
        mine = {self._name(group, index): param for group, index, param in self._params() if param.requires_grad}
        odd = [f"{name} is not in the model" for name in by_name if name not in mine]
        odd += [f"{name} is not in gsnr" for name in mine if name not in by_name]
        odd += [
            f"{name} has shape {tuple(mine[name].shape)}, in gsnr {tuple(row.shape)}"
            for name, row in by_name.items()
            if name in mine and tuple(row.shape) != tuple(mine[name].shape)
        ]
        if odd:
            more = f" and {len(odd) - 10} more" if len(odd) > 10 else ""
            raise ValueError(
                f"gsnr must hold the model's own tensors, by name and shape, but {'; '.join(odd[:10])}{more}; "
                "give the report of a run on the same model and adapter, and parameters with their names"
            )
        for group_index, group in enumerate(self.param_groups):
            names = [self._name(group_index, index) for index in range(len(group["params"]))]
            given = [by_name.get(name) for name in names]
            group["gsnr_given"] = [[row.gsnr, row.status == "fallback"] if row else [0.0, False] for row in given]
        measured = [row for row in rows if row.gsnr and row.status != "fallback"]
        if measured:
            # Where the other run was normalised, gsnr / scale is its maximum, which late tensors may exceed.
            normalized = max(row.gsnr / row.scale for row in measured)
            largest = normalized if normalized > 1.0 + 1e-9 else max(row.gsnr for row in measured)
            for group in self.param_groups:
                group["gsnr_max"], group["gsnr_max_step"] = largest, -1

    def _new_state(self, group_index: int, index: int) -> dict[str, Any]:
        """The state of a tensor before its first gradient, without the buffer."""
        given = self.param_groups[group_index].get("gsnr_given")
        gsnr, fallback = given[index] if given else (0.0, False)
        paired = self.param_groups[group_index]["paired"]
        return {
            "gsnr": gsnr,
            "gsnr_step": 0,
            "gsnr_count": 0,
            "gsnr_fallback": fallback,
            "gsnr_given": gsnr > 0.0,
            **({"pair_norm": 0.0} if paired else {}),
        }

    def _add_buffer(self, group: dict[str, Any], param: Tensor) -> None:
        dtype = STATE_DTYPES[group["state_dtype"]] if group["state_dtype"] else param.dtype
        buffer = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        self.state[param].update(momentum_buffer=buffer, decay_ratio=0.0, decay=0.0)

    def _collect(self, params: Iterable[tuple[int, int, Tensor]]) -> list[tuple[int, int, Tensor]]:
        """Of some tensors, those with a gradient whose g-SNR is not settled; makes the state where there is none."""
        unsettled = []
        for group_index, index, param in params:
            if param.grad is None and not param.requires_grad:
                continue
            group, state = self.param_groups[group_index], self.state[param]
            if not state:
                state.update(self._new_state(group_index, index))
                if group["momentum"] != 0:
                    self._add_buffer(group, param)
            if (
                param.grad is not None
                and param.numel()
                and (
                    state["gsnr_step"] == 0
                    or (state["gsnr_count"] < group["measure_steps"] and not state["gsnr_given"])
                )
            ):
                check_gradient(param, self._name(group_index, index), type(self).__name__)
                unsettled.append((group_index, index, param))
        return unsettled

    def _measure(
        self, unsettled: list[tuple[int, int, Tensor]], moments: list[GradientMoments], step: int
    ) -> tuple[set[Tensor], set[Tensor]]:
        """
        Records the g-SNR of tensors that are not settled.

        Returns:
            Two sets of tensors: those that had their first informative gradient now (the momentum buffer starts with
            it), and those to leave alone in this step (first gradient not finite).
        """
        first: set[Tensor] = set()
        skipped: set[Tensor] = set()
        not_finite: list[str] = []
        for (group_index, index, param), moment in zip(unsettled, moments, strict=True):
            state = self.state[param]
            if not moment.is_finite:
                if state["gsnr_step"] == 0:
                    skipped.add(param)
                    not_finite.append(self._name(group_index, index))
            elif not moment.is_zero:
                if state["gsnr_step"] == 0:
                    first.add(param)
                    state["gsnr_step"] = step
                if not state["gsnr_given"]:
                    _record(state, moment, self.param_groups[group_index]["eps"])
        self._warn_not_finite(not_finite)
        return first, skipped

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
        paired = self._paired_gradients(group) if group["paired"] else {}
        # By what a tensor can need: an update without momentum, a buffer that starts, a buffer that goes on.
        plain, starting, moving = (Batch(weight, *options) for weight in (1.0, 1.0, 1.0 - group["momentum"]))
        for param in params:
            if param.grad is None or (skipped and param in skipped):
                continue
            state = self.state[param]
            scale = state["gsnr"] / normalizer
            batch = moving if scale and group["momentum"] else plain
            if batch is moving:
                if "momentum_buffer" not in state:  # momentum was switched on after the first step
                    self._add_buffer(group, param)
                    batch = starting
                elif first and param in first:
                    batch = starting  # m_1 = g_1
                batch.buffers.append(local(state["momentum_buffer"]))
            batch.params.append(local(param))
            batch.grads.append(paired[param] if param in paired else local(gradient_of(param)))
            batch.coefficients.append(_coefficients(group, state, scale, starts=batch is starting))
        for batch in (plain, starting, moving):
            if batch.params:
                update(batch, group["foreach"], group["fused"])

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
                norm = max((norm_of(param.grad) for param in pair if param.grad is not None), default=0.0)
            if not 0.0 < norm < math.inf:
                continue  # zero, or not finite: nothing is known of the pair yet, and it is not moved
            for state in states:
                state["pair_norm"] = norm
            for index, param in enumerate(pair):
                if param.grad is not None:
                    found[param] = bounded(param.grad, norm, is_a=index == 0)
        return found

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

    def _max_is_fixed(self, step: int) -> bool:
        """Whether the maximum was given, or the window of steps that set it was over before `step`."""
        first_step = self.param_groups[0]["gsnr_max_step"]
        window = max(group["measure_steps"] for group in self.param_groups)
        return first_step < 0 or 0 < first_step <= step - window

    def _update_max(self) -> None:
        """Sets the maximum over the model in the first `measure_steps` steps that measured; it then stays."""
        step = self.param_groups[0]["step"]
        measured = [state for state in self.state.values() if state["gsnr_step"] and not state["gsnr_fallback"]]
        if self._max_is_fixed(step) or not measured:
            return
        largest = max(state["gsnr"] for state in measured)
        for group in self.param_groups:
            group["gsnr_max"], group["gsnr_max_step"] = largest, group["gsnr_max_step"] or step

    def _normalizer(self) -> float:
        """What g-SNR is divided by to give the scale."""
        group = self.param_groups[0]
        if group["normalize"] == "none":
            return 1.0
        # While only fallbacks were seen there is no maximum; the largest of them then keeps the scale at 1 or below.
        return group["gsnr_max"] or max((state["gsnr"] for state in self.state.values()), default=0.0) or 1.0

    def _warn_not_finite(self, names: list[str]) -> None:
        """One warning per step, with tensors that no earlier one named."""
        new = self._new_names(names)
        if new:
            logger.warning(
                "The first gradient of %s has inf or NaN: not measured, and not updated in this step. It will be "
                "measured at its first finite gradient.",
                new,
            )

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
        for (group, name, param, moment), values in zip(
            bf16, gradient_moments([param.detach() for _, _, param, _ in bf16]), strict=True
        ):
            peak = float(self.param_groups[group].get("initial_lr", self.param_groups[group]["lr"]))
            norm = 1.0 if self.param_groups[group]["paired"] else moment.norm
            move = peak * self.state[param]["gsnr"] / normalizer * norm
            if 0.0 < move < BF16_RESOLUTION * values.norm:
                stuck.append((move / values.norm, name))
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


def _dtype_name(dtype: Any) -> Any:
    """`torch.bfloat16` as `"bfloat16"`: a group holds plain values."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


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
    for name in ("maximize", "stochastic_rounding"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False but is {options[name]!r}; give one of the two")
    for name in ("foreach", "fused"):
        if options[name] is not None and not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True, False or None but is {options[name]!r}; None chooses by itself")
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused must not both be True, but they are; set one, or none to let it choose")
    if options["state_dtype"] is not None and options["state_dtype"] not in STATE_DTYPES:
        raise ValueError(
            f"state_dtype must be one of {', '.join(STATE_DTYPES)} or None but is {options['state_dtype']!r}; "
            "None keeps the parameter's"
        )


def _coefficients(group: dict[str, Any], state: dict[str, Any], scale: float, starts: bool) -> Coefficients:
    """
    Of a tensor's update, with the decay folded into the buffer as `updates.py` derives it; keeps what the next needs.

    A pending tensor, whose gradient is zero and whose scale is 0, only decays. With a learning rate on the device what
    the next step needs stays there, in a tensor of its own.
    """
    momentum, weight_decay = group["momentum"], group["weight_decay"]
    on_device = isinstance(group["lr"], Tensor)
    lr = group["lr"].detach() if on_device else float(group["lr"])
    if not scale or not momentum:
        scale = scale or 1.0
        return Coefficients(0.0, weight_decay / scale, lr * scale)
    ratio = weight_decay / scale
    decay = state["decay"] if on_device else float(state["decay"])
    if starts:
        coefficients = Coefficients(0.0, ratio, lr * scale)
    else:
        pull = ratio - momentum * state["decay_ratio"]
        coefficients = Coefficients(momentum * (1.0 - decay), pull, lr * scale)
    state["decay_ratio"] = ratio
    if on_device:
        state["decay"] = decay if isinstance(decay, Tensor) else torch.empty_like(group["lr"])
        state["decay"].copy_(lr).mul_(weight_decay)
    else:
        state["decay"] = lr * weight_decay
    return coefficients


def _record(state: dict[str, Any], moments: GradientMoments, eps: float) -> None:
    """Adds one informative gradient to a tensor's mean g-SNR."""
    constant = moments.is_constant
    gsnr = fallback_snr(moments) if constant else gradient_snr(moments, eps)
    state["gsnr_count"] += 1
    state["gsnr"] += (gsnr - state["gsnr"]) / state["gsnr_count"]
    state["gsnr_fallback"] = state["gsnr_fallback"] or constant


def _status(state: dict[str, Any]) -> str:
    if state["gsnr_fallback"]:
        return "fallback"
    if state["gsnr_given"]:
        return "given"
    return "measured" if state["gsnr_step"] else "pending"
