"""The life of a learning-rate scale: given or pending, measured once, and what may divide it: a maximum or an RMS."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import NamedOptimizer
from .gsnr import GradientMoments, TensorGSNR, fallback_snr, gradient_moments, gradient_snr
from .tensors import check_gradient, gradient_of


logger = logging.getLogger(__name__)

# What a group holds that is no option: the step, and the two divisors with the step that fixed each. Equal in all
# groups. -1 marks a divisor that was given.
SHARED = {"step": 0, "gsnr_max": 0.0, "gsnr_max_step": 0, "gsnr_rms": 0.0, "gsnr_rms_step": 0}


class MeasuredScales(NamedOptimizer):
    """
    An optimizer whose tensors have a scale that is measured from their first informative gradients.

    Groups hold `eps`, `normalize` and `measure_steps`, and the same in each what [`SHARED`] lists.
    The state of a tensor holds `gsnr`, `gsnr_step`, `gsnr_count`, `gsnr_fallback` and `gsnr_given`; see [`SGDSaI`].
    For the report it holds `gradient_norm` and `weight_rms` as they were at the first informative gradient.
    """

    _progress = ("lr", *SHARED)

    def gsnr_statistics(self) -> list[TensorGSNR]:
        """
        What has been measured, one row per tensor in the order of the groups. Reads no device memory.

        Returns:
            `list[TensorGSNR]`: Frozen parameters that were never measured are left out.
        """
        if self.per_tensor is not self:
            return self.per_tensor.gsnr_statistics()
        rows = []
        normalizer = self._normalizer()
        for group_index, index, param in self._params():
            state = self.state.get(param) or self._new_state(group_index, index)
            if not param.requires_grad and not state["gsnr_step"]:
                continue
            rows.append(
                TensorGSNR(
                    name=self._name(group_index, index),
                    shape=self.shape_of(param),
                    numel=math.prod(self.shape_of(param)),
                    group=group_index,
                    gsnr=state["gsnr"],
                    scale=state["gsnr"] / normalizer,
                    step=state["gsnr_step"],
                    status=_status(state),
                    gradient_norm=state.get("gradient_norm", 0.0),  # older states have none
                    weight_rms=state.get("weight_rms", 0.0),
                    factor=self._first_factor(group_index, index, state),
                )
            )
        return rows

    def _first_factor(self, group_index: int, index: int, state: dict[str, Any]) -> float:
        """What the first informative gradient was multiplied by besides the scale."""
        return 1.0

    @property
    def measurements(self) -> int:
        """How many gradients were measured, and tensors with a given scale that began to move."""
        states = self.per_tensor.state.values()
        return sum(state["gsnr_count"] + bool(state["gsnr_given"] and state["gsnr_step"]) for state in states)

    @torch.no_grad()
    def measure_now(self) -> dict[str, float]:
        """
        g-SNR of the gradients that are there now, by name, for a look at how it changes; the scales stay.

        A gradient that is zero, constant or not finite is left out. Collective where gradients are sharded.
        """
        there = (place for place in self._params() if place[2].grad is not None or self._pieces is not None)
        return self._snr_of(there)

    def _snr_of(self, places: Iterable[tuple[int, int, Tensor]]) -> dict[str, float]:
        """g-SNR of the gradients of some tensors, which have one."""
        there = list(places)
        moments = self._moments(there)
        return {
            self._name(group, index): gradient_snr(moment, self.param_groups[group]["eps"])
            for (group, index, _), moment in zip(there, moments, strict=True)
            if moment.is_finite and not moment.is_zero and not moment.is_constant
        }

    def measure_in_next_step(self) -> None:
        """Has the next step do what [`MeasuredScales.measure_now`] does, before it moves anything."""
        self.per_tensor.__dict__["_measures_next"] = True

    def take_measured(self) -> dict[str, float] | None:
        """What was measured after [`MeasuredScales.measure_in_next_step`], once; `None` where nothing was."""
        found: dict[str, float] | None = self.per_tensor.__dict__.pop("_measured_then", None)
        return found

    def _look(self) -> None:
        if self.__dict__.pop("_measures_next", False):
            self.__dict__["_measured_then"] = self.measure_now()
        super()._look()

    def take_scales(self, rows: Iterable[Any]) -> None:
        """
        Scales to use instead of measuring, as the constructor's `gsnr`; before the first step.

        Args:
            rows (iterable): Such as `measure_gsnr` gives.

        Raises:
            `RuntimeError`: A step was made.
            `ValueError`: The rows do not fit.
        """
        if self.state or self.is_partitioned:
            raise RuntimeError("scales can be given before the first step only, but one was made; pass gsnr= instead")
        self._take_given(list(rows))

    def _take_given(self, rows: list[Any]) -> None:
        """Keeps the scales of another run in the groups (`gsnr_given`), until the state is made."""
        by_name = {row.name: row for row in rows}
        mine = {self._name(group, index): param for group, index, param in self._params() if param.requires_grad}
        odd = [f"{name} is not in the model" for name in by_name if name not in mine]
        odd += [f"{name} is not in gsnr" for name in mine if name not in by_name]
        odd += [
            f"{name} has shape {self.shape_of(mine[name])}, in gsnr {tuple(row.shape)}"
            for name, row in by_name.items()
            if name in mine and tuple(row.shape) != self.shape_of(mine[name])
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
            # What the other run divided by. If that was its maximum, the tensor that set it has the scale 1.
            divisor = max(row.gsnr / row.scale for row in measured)
            undivided = abs(divisor - 1.0) < 1e-9
            was_maximum = not undivided and any(abs(row.scale - 1.0) < 1e-6 for row in measured)
            for group in self.param_groups:
                # Late tensors may exceed the maximum of then.
                group["gsnr_max"] = divisor if was_maximum else max(row.gsnr for row in measured)
                group["gsnr_max_step"] = -1
                if not (undivided or was_maximum):
                    group["gsnr_rms"], group["gsnr_rms_step"] = divisor, -1

    def _new_state(self, group_index: int, index: int) -> dict[str, Any]:
        """What is kept of a tensor's scale, before its first gradient."""
        given = self.param_groups[group_index].get("gsnr_given")
        gsnr, fallback = given[index] if given else (0.0, False)
        return {
            "gsnr": gsnr,
            "gsnr_step": 0,
            "gsnr_count": 0,
            "gsnr_fallback": fallback,
            "gsnr_given": gsnr > 0.0,
            "gradient_norm": 0.0,
            "weight_rms": 0.0,
        }

    def _make_state(self, group_index: int, index: int, param: Tensor) -> None:
        """Where there is none yet; a subclass adds what its update needs."""
        self.state[param].update(self._new_state(group_index, index))

    def _collect(self, params: Iterable[tuple[int, int, Tensor]]) -> list[tuple[int, int, Tensor]]:
        """Of some tensors, those with a gradient whose g-SNR is not settled; makes the state where there is none."""
        unsettled = []
        for group_index, index, param in params:
            if param.grad is None and not param.requires_grad:
                continue
            group, state = self.param_groups[group_index], self.state[param]
            if not state:
                self._make_state(group_index, index, param)
            is_open = state["gsnr_count"] < group["measure_steps"] and not state["gsnr_given"]
            if (state["gsnr_step"] == 0 or is_open) and self._has_gradient(group_index, index, param):
                unsettled.append((group_index, index, param))
        return unsettled

    def _has_gradient(self, group_index: int, index: int, param: Tensor) -> bool:
        """Whether there is something to measure; of pieces always, since ZeRO has zeros where nothing came."""
        if self._pieces is not None:
            return True
        if param.grad is None or not param.numel():
            return False
        check_gradient(param, self._name(group_index, index), type(self).__name__)
        return True

    def _moments(self, unsettled: list[tuple[int, int, Tensor]]) -> list[GradientMoments]:
        params = [param for _, _, param in unsettled]
        if self._pieces is not None:
            return self._pieces.moments(params)
        return gradient_moments([gradient_of(param) for param in params])

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
                    state["gsnr_step"], state["gradient_norm"] = step, moment.norm
                if not state["gsnr_given"]:
                    _record(state, moment, self.param_groups[group_index]["eps"])
        self._note_weights([param for _, _, param in unsettled if param in first])
        self._tell_not_measured(not_finite)
        return first, skipped

    def _note_weights(self, params: list[Tensor]) -> None:
        """Keeps the root mean square of tensors that are about to move for the first time."""
        weights = [param.detach() for param in params]
        moments = gradient_moments(weights) if self._pieces is None else self._pieces.weight_moments(params)
        for param, moment in zip(params, moments, strict=True):
            self.state[param]["weight_rms"] = moment.norm / math.sqrt(moment.count) if moment.is_finite else 0.0

    def _count_step(self, moments: list[GradientMoments]) -> None:
        """
        Counts this step, as those who call `step()` count, but for one that torch.distributed.checkpoint makes.

        It makes the state before it loads: nothing was measured yet, all gradients are zero, and so are learning
        rates. That must leave no trace.
        """
        started = any(state["gsnr_step"] for state in self.state.values()) if moments else True
        without_trace = not started and all(moment.is_zero for moment in moments)
        if without_trace and all(float(group["lr"]) == 0.0 for group in self.param_groups):
            return
        for group in self.param_groups:
            group["step"] += 1

    def _is_fixed(self, divisor: str, step: int) -> bool:
        """Whether `gsnr_max` or `gsnr_rms` was given, or the window of steps that set it was over before `step`."""
        first_step = self.param_groups[0][f"{divisor}_step"]
        window = max(group["measure_steps"] for group in self.param_groups)
        return first_step < 0 or 0 < first_step <= step - window

    def _divides(self, step: int) -> bool:
        """Whether the scales of `step` hang on all gradients of the model."""
        normalize = self.param_groups[0]["normalize"]
        return normalize != "none" and not self._is_fixed(f"gsnr_{normalize}", step)

    def _update_divisors(self, unsettled: list[tuple[int, int, Tensor]], moments: list[GradientMoments]) -> None:
        """
        Sets what may divide g-SNR in the first `measure_steps` steps that measured; it then stays.

        While nothing but fallbacks was seen there is no maximum, and the RMS is only of the step.
        """
        step = self.param_groups[0]["step"]
        states = self.state.values()
        measured = [state["gsnr"] for state in states if state["gsnr_step"] and not state["gsnr_fallback"]]
        found: dict[str, float] = {}
        if measured and not self._is_fixed("gsnr_max", step):
            found["gsnr_max"] = max(measured)
        if not self._is_fixed("gsnr_rms", step):
            found["gsnr_rms"] = self._rms_of_scaled(unsettled, moments)
        for divisor, value in found.items():
            for group in self.param_groups:
                group[divisor] = value or group[divisor]
                if value and measured:
                    group[f"{divisor}_step"] = group[f"{divisor}_step"] or step

    def _rms_of_scaled(self, unsettled: list[tuple[int, int, Tensor]], moments: list[GradientMoments]) -> float:
        """RMS over all elements of the informative gradients of this step, each times its g-SNR; 0 where none is."""
        squares, count = 0.0, 0
        for (*_, param), moment, norm in zip(unsettled, moments, self._moved_norms(unsettled, moments), strict=True):
            if moment.is_finite and not moment.is_zero:
                squares += (self.state[param]["gsnr"] * norm) ** 2
                count += moment.count
        return math.sqrt(squares / count) if count else 0.0

    def _moved_norms(self, unsettled: list[tuple[int, int, Tensor]], moments: list[GradientMoments]) -> list[float]:
        """The norms of what tensors are moved by, before learning rate and scale: their gradients; 0 if not finite."""
        return [moment.norm if moment.is_finite else 0.0 for moment in moments]

    def _normalizer(self) -> float:
        """What g-SNR is divided by to give the scale."""
        group = self.param_groups[0]
        if group["normalize"] == "none":
            return 1.0
        if group["normalize"] == "rms":
            return group["gsnr_rms"] or 1.0
        # While only fallbacks were seen there is no maximum; the largest of them then keeps the scale at 1 or below.
        return group["gsnr_max"] or max((state["gsnr"] for state in self.state.values()), default=0.0) or 1.0

    def _tell_not_measured(self, names: list[str]) -> None:
        """One warning per step, with tensors that no earlier one named."""
        new = self._new_names(names)
        if new:
            logger.warning(
                "The first gradient of %s has inf or NaN: not measured, and not updated in this step. It will be "
                "measured at its first finite gradient.",
                new,
            )


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
