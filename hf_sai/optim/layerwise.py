"""
Layer-wise updates: each parameter is updated, and its gradient freed, inside the backward pass.

The gradients of the whole model never stand in memory at once. It is still one `torch.optim.Optimizer`: schedulers,
`state_dict()` and the g-SNR report work as with the ordinary one.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .gsnr import gradient_moments
from .sgd_sai import SGDSaI
from .swan import SWAN
from .tensors import is_sharded


class LayerwiseMixin:
    """
    Put before an optimizer that has `_advance()`, the body of its `step()`, and
    `_update_in_backward(group_index, index, param) -> bool`.

    The latter updates one parameter from its gradient and says whether it did; where it did not, the gradient stays
    for `step()`. Call `step()` after every backward pass as usual.

    What needs all gradients at once can't work with it, and is refused where it can be seen: gradient accumulation,
    more than one process, sharded parameters, a `GradScaler`. Clipping can't be seen from here: there is nothing left
    to clip. The Trainer's settings are checked before the first step.
    """

    param_groups: list[dict[str, Any]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the ordinary optimizer's."""
        super().add_param_group(param_group)  # type: ignore[misc]
        self._attach()

    def _attach(self) -> None:
        """Hooks every trainable parameter once; a frozen one is updated by `step()` if it is unfrozen later."""
        handles: list[Any] = self.__dict__.setdefault("_handles", [])
        while handles:
            handles.pop().remove()
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._updated: set[Tensor] = set()
        # A weak reference: parameters outlive optimizers, and would keep this one (and its state) alive.
        hook = _Hook(weakref.ref(self))
        for group_index, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                self._places[param] = (group_index, index)
                if param.requires_grad:
                    handles.append(param.register_post_accumulate_grad_hook(hook))

    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        self._refuse(param)
        if self._update_in_backward(*self._places[param], param):  # type: ignore[attr-defined]
            self._updated.add(param)
            param.grad = None

    def _refuse(self, param: Tensor) -> None:
        """Raises `RuntimeError` for what needs all gradients at once."""
        name = type(self).__name__
        if param in self._updated:
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

    def _advance(self) -> None:
        """Ends the step: counts it, and updates what is left, which is what the backward pass could not."""
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{type(self).__name__} updates in the backward pass, with gradients that a GradScaler has "
                "multiplied; train in bf16 or float32, or use the optimizer that is not layer-wise"
            )
        super()._advance()  # type: ignore[misc]
        self._updated.clear()

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

    def _update_in_backward(self, group_index: int, index: int, param: Tensor) -> bool:
        group = self.param_groups[group_index]
        step = group["step"] + 1
        unsettled = self._collect([(group_index, index, param)])
        if group["paired"] or self._divides(step):
            return False
        moments = gradient_moments([param.grad for *_, param in unsettled if param.grad is not None])
        first, skipped = self._measure(unsettled, moments, step)
        if unsettled:
            self._warn_if_bf16_stays(unsettled, moments, first)
        self._update(group, [param], self._normalizer(), first, skipped)
        return True


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
