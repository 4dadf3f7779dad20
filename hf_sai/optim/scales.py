"""The life of a learning-rate scale: given or pending, measured once, and the maximum that may divide it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import NamedOptimizer
from .gsnr import GradientMoments, TensorGSNR, fallback_snr, gradient_moments, gradient_snr
from .tensors import check_gradient, gradient_of


logger = logging.getLogger(__name__)


class MeasuredScales(NamedOptimizer):
    """
    An optimizer whose tensors have a scale that is measured from their first informative gradients.

    Groups hold `eps`, `normalize` and `measure_steps`, and the same in each `step`, `gsnr_max` and `gsnr_max_step`.
    The state of a tensor holds `gsnr`, `gsnr_step`, `gsnr_count`, `gsnr_fallback` and `gsnr_given`; see [`SGDSaI`].
    """

    _progress = ("lr", "step", "gsnr_max", "gsnr_max_step")

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

    @property
    def measurements(self) -> int:
        """How many gradients were measured, and tensors with a given scale that began to move."""
        states = self.state.values()
        return sum(state["gsnr_count"] + bool(state["gsnr_given"] and state["gsnr_step"]) for state in states)

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
        """What is kept of a tensor's scale, before its first gradient."""
        given = self.param_groups[group_index].get("gsnr_given")
        gsnr, fallback = given[index] if given else (0.0, False)
        return {
            "gsnr": gsnr,
            "gsnr_step": 0,
            "gsnr_count": 0,
            "gsnr_fallback": fallback,
            "gsnr_given": gsnr > 0.0,
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
        self._tell_not_measured(not_finite)
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
