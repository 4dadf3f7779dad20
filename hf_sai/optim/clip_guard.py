"""
What torch's functions that clip tell the optimizers here, and what they ask them.

Clipping reads all gradients for their norm. Where that is finite so are they, and a step need not look again, which
would be a fifth of its traffic. A norm stays with the gradients that it was taken of, until they change.

Clipping that comes too late is refused: a gradient that a layer-wise optimizer used in the backward pass, and freed,
is `None` for whoever clips, as that of a frozen parameter; torch says nothing then, and the step was made without
clipping.
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad


_guarded: weakref.WeakSet[Any] = weakref.WeakSet()


def guard(optimizer: Any) -> None:
    """
    From now on clipping of what this optimizer has used is an error.

    Args:
        optimizer (`LayerwiseMixin`): With `has_used(param) -> bool`.
    """
    listen()
    _guarded.add(optimizer)


def listen() -> None:
    """Puts what is done here before and after torch's functions, under the names by which all reach them; once."""
    if hasattr(clip_grad.clip_grad_value_, "_is_heard"):
        return
    # All that clips by a norm comes through these two, also where a script has imported `clip_grad_norm_` by name.
    clip_grad._get_total_norm = _noting(clip_grad._get_total_norm)
    clip_grad._clip_grads_with_norm_ = _keeping(_asking(clip_grad._clip_grads_with_norm_))
    by_value = _asking(clip_grad.clip_grad_value_)
    clip_grad.clip_grad_value_ = torch.nn.utils.clip_grad_value_ = by_value


def norm_with(gradient: Tensor) -> Tensor | None:
    """
    A norm that is finite only if a gradient is, where clipping has computed one and the gradient is still that.

    Without dimensions, on the gradient's device; it may be that of many gradients.
    """
    known: tuple[Tensor, int] | None = getattr(gradient, "_norm_with", None)  # with the version that it is of
    return known[0] if known is not None and known[1] == gradient._version else None


def _noting(total_norm: Callable[..., Tensor]) -> Any:
    """As `_get_total_norm`, whose result the gradients keep."""

    @functools.wraps(total_norm)
    def noted(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        norm = total_norm(tensors, norm_type, *args, **kwargs)
        # A DTensor would be read by a collective, and norms of order 0 and below are finite where a gradient is not.
        if not torch.compiler.is_compiling() and type(norm) is Tensor and float(norm_type) > 0.0:
            for tensor in tensors:
                if tensor.device == norm.device and not tensor.is_inference():  # these have no version
                    tensor._norm_with = (norm, tensor._version)
        return norm

    return noted


def _keeping(clip: Callable[..., None]) -> Any:
    """As `_clip_grads_with_norm_`, which multiplies by at most 1: gradients that have this norm keep it."""
    signature = inspect.signature(clip)

    @functools.wraps(clip)
    def kept(*args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return clip(*args, **kwargs)
        parameters, bound, norm, *rest = _arguments(signature, args, kwargs)
        gradients = [param.grad for param in parameters if param.grad is not None]
        same = [gradient for gradient in gradients if norm_with(gradient) is norm] if float(bound) >= 0.0 else []
        clip(parameters, bound, norm, *rest)
        for gradient in same:
            gradient._norm_with = (norm, gradient._version)

    return kept


def _asking(clip: Callable[..., Any]) -> Any:
    signature = inspect.signature(clip)

    @functools.wraps(clip)
    def asked(*args: Any, **kwargs: Any) -> Any:
        parameters, bound, *rest = _arguments(signature, args, kwargs)
        if _guarded and math.isfinite(bound):  # the Trainer asks for the norm by a bound of infinity
            _refuse_late(parameters)
        return clip(parameters, bound, *rest)

    asked._is_heard = True  # type: ignore[attr-defined]
    return asked


def _arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> list[Any]:
    """What a function was called with, in its order; parameters as a list, which can be read more than once."""
    parameters, *rest = signature.bind(*args, **kwargs).args
    return [[parameters] if isinstance(parameters, Tensor) else list(parameters), *rest]


def _refuse_late(parameters: list[Tensor]) -> None:
    for optimizer in list(_guarded):
        used = sum(optimizer.has_used(param) for param in parameters)
        if used:
            raise RuntimeError(
                f"{type(optimizer).__name__} updates in the backward pass, which has used {used} of these "
                f"{len(parameters)} gradients before they could be clipped; leave clipping out (gradient_clip_val in "
                "Lightning, max_grad_norm in the Trainer), or use the optimizer that is not layer-wise"
            )
