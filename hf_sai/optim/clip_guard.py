"""
Clipping that comes too late is refused: torch's functions that clip ask the layer-wise optimizers first.

A gradient that was used in the backward pass, and freed, is `None` for whoever clips, as that of a frozen parameter;
torch says nothing then, and the step was made without clipping.
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

    The first call puts checks before torch's functions, under the names by which hosts and scripts reach them.

    Args:
        optimizer (`LayerwiseMixin`): With `has_used(param) -> bool`.
    """
    if not hasattr(clip_grad.clip_grad_value_, "_asks_first"):
        # All that clips by a norm comes through the first, also where a script has imported `clip_grad_norm_` by name.
        clip_grad._clip_grads_with_norm_ = _asking(clip_grad._clip_grads_with_norm_)
        by_value = _asking(clip_grad.clip_grad_value_)
        clip_grad.clip_grad_value_ = torch.nn.utils.clip_grad_value_ = by_value
    _guarded.add(optimizer)


def _asking(clip: Callable[..., Any]) -> Any:
    signature = inspect.signature(clip)

    @functools.wraps(clip)
    def asked(*args: Any, **kwargs: Any) -> Any:
        parameters, bound, *rest = signature.bind(*args, **kwargs).args
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if math.isfinite(bound):  # the Trainer asks for the norm by a bound of infinity
            _refuse_late(parameters)
        return clip(parameters, bound, *rest)

    asked._asks_first = True  # type: ignore[attr-defined]
    return asked


def _refuse_late(parameters: list[Tensor]) -> None:
    for optimizer in list(_guarded):
        used = sum(optimizer.has_used(param) for param in parameters)
        if used:
            raise RuntimeError(
                f"{type(optimizer).__name__} updates in the backward pass, which has used {used} of these "
                f"{len(parameters)} gradients before they could be clipped; leave clipping out (gradient_clip_val in "
                "Lightning, max_grad_norm in the Trainer), or use the optimizer that is not layer-wise"
            )
