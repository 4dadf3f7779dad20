"""
Layer-wise updates: each parameter is updated, and its gradient freed, inside the backward pass.

The gradients of the whole model never stand in memory at once. It is still one `torch.optim.Optimizer`: schedulers,
`state_dict()` and the g-SNR report work as with the ordinary one.
"""

from __future__ import annotations

import logging
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.variable import Variable

from .clip_guard import guard
from .gsnr import GradientMoments, gradient_moments
from .sgd_sai import SGDSaI
from .swan import SWAN
from .tensors import is_sharded


logger = logging.getLogger(__name__)

# Runs the backward of a torch.autograd.Function that is written in Python.
_PYTHON_BACKWARD = {
    getattr(BackwardCFunction, name).__code__ for name in ("apply", "apply_boxed") if hasattr(BackwardCFunction, name)
}


class LayerwiseMixin:
    """
    Put before an optimizer that has `_advance()`, the body of its `step()`, and
    `_update_in_backward(group_index, index, param) -> bool`.

    The latter updates one parameter from its gradient and says whether it did; where it did not, the gradient stays
    for `step()`. Call `step()` after every backward pass as usual.

    The hooks are there from construction to [`~LayerwiseMixin.detach`], which the Trainer's end calls too: from then
    on a backward pass leaves gradients and moves nothing, and `step()` is the ordinary optimizer's.

    A pass that ends with an error leaves nothing behind but the updates it has made, so that a loop may try again.
    Likewise `zero_grad()` instead of `step()` ends a pass.

    What needs all gradients at once can't work with it, and is refused where it can be seen: gradient accumulation,
    clipping, more than one process, sharded parameters, a `GradScaler`. The Trainer's settings are checked before the
    first step.

    A parameter whose gradient may come in several parts, as within `torch.utils.checkpoint` with `use_reentrant=True`,
    is updated by `step()`, and one warning says so.
    """

    param_groups: list[dict[str, Any]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self.__dict__.get("_is_attached", True):
            self.attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the ordinary optimizer's."""
        super().add_param_group(param_group)  # type: ignore[misc]
        if self.__dict__.get("_is_attached", True):
            self.attach()

    def attach(self) -> None:
        """
        Hooks every trainable parameter once; a frozen one is updated by `step()` if it is unfrozen later.

        Called by the constructor, and by the Trainer when a training begins; to be called again after
        [`~LayerwiseMixin.detach`].
        """
        self.detach()
        self._is_attached = True
        self._places: dict[Tensor, tuple[int, int]] = {}
        # A weak reference: parameters outlive optimizers, and would keep this one (and its state) alive.
        hook = _Hook(weakref.ref(self))
        for group_index, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                self._places[param] = (group_index, index)
                if param.requires_grad:
                    self._handles.append(param.register_post_accumulate_grad_hook(hook))
        guard(self)

    def detach(self) -> None:
        """Takes the hooks off the parameters: from now on backward passes leave gradients, and move nothing."""
        self._begin_anew()
        self._handles: list[Any] = self.__dict__.get("_handles", [])
        while self._handles:
            self._handles.pop().remove()
        self._is_attached = False

    def _begin_anew(self) -> None:
        self._updated: dict[Tensor, _Pass] = {}  # since the last step(), with the pass that did it
        self._passes: dict[int, _Pass] = {}  # those that run, by autograd's number
        self._not_finite: list[str] = []

    def has_used(self, param: Tensor) -> bool:
        """Whether a backward pass has updated a parameter, and the step that it belongs to has not ended."""
        return param in self._updated

    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        current = self._current_pass()
        self._refuse(param)
        if current.is_nested:
            self._warn_once_of_parts()
            return
        if self._update_in_backward(*self._places[param], param):  # type: ignore[attr-defined]
            self._updated[param] = current
            param.grad = None

    def _current_pass(self) -> _Pass:
        number = torch._C._current_graph_task_id()
        if number not in self._passes:
            self._passes = {key: each for key, each in self._passes.items() if each.is_running}
            self._passes[number] = _Pass()
        return self._passes[number]

    def _refuse(self, param: Tensor) -> None:
        """Raises `RuntimeError` for what needs all gradients at once."""
        name = type(self).__name__
        if param.grad is None:
            raise RuntimeError(
                f"{name} updates in the backward pass, but somebody else has taken this gradient, such as another "
                "layer-wise optimizer of the same parameters; call its detach() first"
            )
        earlier = self._updated.get(param)
        if earlier is not None and not earlier.has_failed:
            raise RuntimeError(
                f"{name} updates in the backward pass, so one pass has to be one step, but a second one came before "
                "step(); set gradient_accumulation_steps=1, or use the optimizer that is not layer-wise"
            )
        distributed = torch.distributed
        if is_sharded(param) or (distributed.is_initialized() and distributed.get_world_size() > 1):
            ranks = distributed.get_world_size() if distributed.is_initialized() else 1
            raise RuntimeError(
                f"{name} updates before gradients are averaged over the processes, but there are {ranks}, and the "
                f"parameter is {'' if is_sharded(param) else 'not '}sharded; train on one process without FSDP, or "
                "use the optimizer that is not layer-wise"
            )

    def _warn_once_of_parts(self) -> None:
        if not self.__dict__.get("_warned_of_parts"):
            self._warned_of_parts = True
            logger.warning(
                "%s: activation checkpointing with use_reentrant=True hands out gradients in parts, which wait for "
                "step() and need the memory of the ordinary optimizer; set use_reentrant=False.",
                type(self).__name__,
            )

    def _advance(self) -> None:
        """Ends the step: counts it, and updates what is left, which is what the backward pass could not."""
        # GradScaler.step() sets both for the time of the call. After unscale_() grad_scale is None, but that found no
        # gradients to divide.
        scaled = [self.__dict__.pop(name, None) is not None for name in ("grad_scale", "found_inf")]
        if any(scaled):
            raise RuntimeError(
                f"{type(self).__name__} updates in the backward pass, with gradients that a GradScaler has "
                "multiplied; train in bf16 or float32, or use the optimizer that is not layer-wise"
            )
        super()._advance()  # type: ignore[misc]
        self._updated.clear()
        names, self._not_finite = self._not_finite, []
        super()._tell_not_finite(self._in_order(names))  # type: ignore[misc]

    def _tell_not_finite(self, names: list[str]) -> None:
        """Said once for all tensors of a step, at its end."""
        self._not_finite.extend(names)

    def _any_gradient(self) -> bool:
        return bool(self._updated) or super()._any_gradient()  # type: ignore[misc]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the ordinary optimizer's. In the place of `step()` it ends a pass whose loss was not wanted."""
        super().zero_grad(set_to_none)  # type: ignore[misc]
        self._updated.clear()

    def _in_order(self, names: list[str]) -> list[str]:
        """In that of the groups, and not of the backward pass."""
        own: Any = self
        return [name for group, index, _ in own._params() if (name := own._name(group, index)) in names]

    # GradScaler then hands its scale on instead of failing with a message about "inf checks".
    _step_supports_amp_scaling = True


class _Hook:
    """Called by autograd when a parameter's gradient is complete."""

    def __init__(self, optimizer: weakref.ref[Any]) -> None:
        self.optimizer = optimizer

    def __call__(self, param: Tensor) -> None:
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer._on_gradient(param)


class _Pass:
    """
    The backward pass that runs now: whether it runs within another, and what became of it.

    Autograd calls `finish` at its end. Where it fails it forgets that, and nobody else holds it.
    """

    def __init__(self) -> None:
        self.is_complete = False

        def finish() -> None:
            self.is_complete = True

        self._finish = weakref.ref(finish)
        Variable._execution_engine.queue_callback(finish)
        frame: Any = sys._getframe()
        while frame is not None and frame.f_code not in _PYTHON_BACKWARD:
            frame = frame.f_back
        self.is_nested = frame is not None

    @property
    def is_running(self) -> bool:
        return not self.is_complete and self._finish() is not None

    @property
    def has_failed(self) -> bool:
        return not self.is_complete and self._finish() is None


class SGDSaILayerwise(LayerwiseMixin, SGDSaI):
    """
    [`SGDSaI`] with layer-wise updates; the same arguments, the same results.

    With `normalize="max"` or `"rms"` the updates of the steps that fix the divisor wait for `step()`, since it is
    taken over all gradients: these steps need the memory of the ordinary optimizer. So do LoRA factors that are
    trained as pairs: the norm that bounds both is known when both gradients are.

    Raises:
        `RuntimeError`: In the backward pass or `step()`: gradient accumulation, more than one process, sharded
            parameters, or a `GradScaler`.
    """

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._tracked: dict[str, float] | None = None
        self._not_measured: list[str] = []
        self._bf16: tuple[list[Any], list[GradientMoments], set[Tensor]] = ([], [], set())

    def _update_in_backward(self, group_index: int, index: int, param: Tensor) -> bool:
        group, place = self.param_groups[group_index], (group_index, index, param)
        step = group["step"] + 1
        unsettled = self._collect([place])
        if group["paired"] or self._divides(step):
            return False
        if self._tracked is not None:
            self._tracked |= self._snr_of([place])
        moments = gradient_moments([param.grad for *_, param in unsettled if param.grad is not None])
        first, skipped = self._measure(unsettled, moments, step)
        if unsettled:
            self._warn_if_bf16_stays(unsettled, moments, first)
        self._update(group, [param], self._normalizer(), first, skipped)
        return True

    def measure_next_pass(self) -> None:
        """Has the next backward pass measure each gradient before it is used, for [`~SGDSaILayerwise.measure_now`]."""
        self._tracked = {}

    def measure_in_next_step(self) -> None:
        """As [`SGDSaI`]'s; the pass before it belongs to it."""
        super().measure_in_next_step()
        self.measure_next_pass()

    def measure_now(self) -> dict[str, float]:
        """As [`SGDSaI.measure_now`]; with what was measured since [`~SGDSaILayerwise.measure_next_pass`]."""
        found = (self._tracked or {}) | super().measure_now()
        self._tracked = None
        names = [self._name(group_index, index) for group_index, index, _ in self._params()]
        return {name: found[name] for name in names if name in found}

    # What a step warns of is said once for all tensors, at its end.

    def _advance(self) -> None:
        super()._advance()
        names, bf16 = self._not_measured, self._bf16
        self._not_measured, self._bf16 = [], ([], [], set())
        super()._tell_not_measured(self._in_order(names))
        super()._warn_if_bf16_stays(*bf16)

    def _tell_not_measured(self, names: list[str]) -> None:
        self._not_measured.extend(names)

    def _warn_if_bf16_stays(
        self, unsettled: list[tuple[int, int, Tensor]], moments: list[GradientMoments], first: set[Tensor]
    ) -> None:
        self._bf16[0].extend(unsettled)
        self._bf16[1].extend(moments)
        self._bf16[2].update(first)


class SWANLayerwise(LayerwiseMixin, SWAN):
    """
    [`SWAN`] with layer-wise updates; the same arguments, the same results. Matrices are whitened one at a time.

    Raises:
        `RuntimeError`: In the backward pass or `step()`: gradient accumulation, more than one process, sharded
            parameters, or a `GradScaler`.
    """

    def extra_bytes(self, one_at_a_time: bool = True) -> int:
        """As [`SWAN.extra_bytes`]."""
        return super().extra_bytes(one_at_a_time)
