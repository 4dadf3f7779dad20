"""
What one update of SGD-SaI computes: coefficients of each tensor, and batches of tensors that go together.

Decoupled decay costs no pass over memory of its own, and a whole group takes one call, because both the decay and the
scales are folded into the momentum buffer. With `m' = mu m + (1 - mu) g`, the g-SNR `S` of a tensor, `z` for what
divides it and `e = lr / z`, the update `p <- p (1 - lr weight_decay) - lr (S / z) m` is

    N = S m + c p,   c = weight_decay z,   p <- p - e N

and neither `e` nor `c` knows the tensor. With "before" (`b`) for the tensor's last update, and `r = S / S_b`, follows

    N' = mu r (1 - c_b e_b) N + (1 - mu) S g + (c - mu r c_b) p

which is the recurrence of SGD with coupled decay, for which torch has a kernel, and holds for any change of learning
rate, decay, momentum, g-SNR and divisor between the steps. `r` is 1 once a scale is settled, so that only the weight
of the gradient differs between the tensors of a group. The momentum buffer holds `N`, and the state `S_b`
(`buffer_scale`), `c_b` (`decay_ratio`) and `c_b e_b` (`decay`). A state of before 0.2 has no `buffer_scale` and holds
`N` for `S_b = 1`: the same recurrence takes it on. Where the learning rate is a tensor, as CUDA graphs need it, `c` is
0 in the buffer, and the decay is applied to the parameter in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .rounding import Rounding


class Coefficients(NamedTuple):
    """
    Of one tensor's update: `N <- keep * N + weight * g + pull * p`, then `p <- p - step * (N + after * p)`.

    Without a buffer `N` is `weight * g + pull * p`. With a learning rate that is a tensor `step` is one too, without
    dimensions, and nothing is read back from the device; `after` is 0 otherwise.
    """

    keep: float
    weight: float
    pull: float
    step: Any  # float or Tensor
    after: float = 0.0


def next_coefficients(
    group: dict[str, Any], state: dict[str, Any], step: float | Tensor, divisor: float, starts: bool
) -> Coefficients:
    """
    Of a tensor's update, with the decay and the scale folded into the buffer as it is derived above.

    Args:
        group (`dict`): With `lr`, `momentum` and `weight_decay`.
        state (`dict`): Of the tensor, with `gsnr`; 0 marks a pending tensor, whose gradient is zero and which only
            decays. `buffer_scale`, `decay_ratio` and `decay` are those of the update before, and written for the next;
            not where there is no buffer.
        step (`float` or `torch.Tensor`): The learning rate, divided by `divisor`.
        divisor (`float`): Of g-SNR.
        starts (`bool`): Whether this is the first step of the buffer.
    """
    momentum, ratio, scale = group["momentum"], group["weight_decay"] * divisor, state["gsnr"]
    if not scale or not momentum:
        return Coefficients(0.0, scale or 1.0, ratio, step)
    by_tensor = not isinstance(step, float)
    folded, after = (0.0, ratio) if by_tensor else (ratio, 0.0)
    if starts:
        found = Coefficients(0.0, scale, folded, step, after)
    else:
        kept = momentum * (scale / state.get("buffer_scale", 1.0))
        pull = folded - kept * state["decay_ratio"]
        found = Coefficients(kept * (1.0 - state["decay"]), (1.0 - momentum) * scale, pull, step, after)
    state["buffer_scale"], state["decay_ratio"] = scale, folded
    state["decay"] = 0.0 if by_tensor else folded * step
    return found


@dataclass
class Batch:
    """
    Tensors that are updated together; plain tensors, no DTensor.

    Args:
        maximize (`bool`): Whether the gradients are negated.
        rounding (`Rounding`, *optional*): Of low-precision parameters, if not to the nearest.
        params (`list[torch.Tensor]`): Written.
        grads (`list[torch.Tensor]`): Read. Shapes of `params`.
        buffers (`list[torch.Tensor]`): Written; of all tensors or of none. Shapes of `params`, any floating dtype.
        errors (`list[torch.Tensor]`): As `buffers`, of the parameters' dtype: what rounding lost (Kahan).
        coefficients (`list[Coefficients]`): One per tensor.
        found (`torch.Tensor`, *optional*): A float32 number without dimensions on the tensors' device: where it is not
            0, all of them and their buffers stay as they are, which the host is not told.
    """

    maximize: bool = False
    rounding: Rounding | None = None
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    coefficients: list[Coefficients] = field(default_factory=list)
    found: Tensor | None = None

    def append(
        self, param: Tensor, grad: Tensor, buffer: Tensor | None, coefficients: Coefficients, error: Tensor | None
    ) -> None:
        """Adds a tensor; all have a buffer or none, and the same of errors."""
        self.params.append(param)
        self.grads.append(grad)
        self.coefficients.append(coefficients)
        if buffer is not None:
            self.buffers.append(buffer)
        if error is not None:
            self.errors.append(error)

    def take(self, indices: Sequence[int]) -> Batch:
        """A batch of some of the tensors."""
        if len(indices) == len(self.params):
            return self
        return Batch(
            self.maximize,
            self.rounding,
            [self.params[i] for i in indices],
            [self.grads[i] for i in indices],
            [self.buffers[i] for i in indices] if self.buffers else [],
            [self.errors[i] for i in indices] if self.errors else [],
            [self.coefficients[i] for i in indices],
            self.found,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Coefficients]]:
        buffers: Sequence[Tensor | None] = self.buffers or [None] * len(self.params)
        return iter(zip(self.params, self.grads, buffers, self.coefficients, strict=True))

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        """Parameters, gradients, buffers and errors."""
        return self.params, self.grads, self.buffers, self.errors

    @property
    def sign(self) -> float:
        """Of the gradients."""
        return -1.0 if self.maximize else 1.0
