"""How low-precision parameters are rounded so that updates below their resolution are not lost."""

from __future__ import annotations

import torch
from torch import Tensor


class Rounding:
    """
    How parameters in bf16 and fp16 are rounded in one call of an update; computed in float32 either way.

    At random (`seed` is not `None`): bf16 to one of its two neighbours, so that the mean is right. The noise comes
    from a generator of its own that is seeded with `seed`, so that replicas on other ranks round alike, whatever the
    global random numbers are, and a resumed run goes on as it would have.

    To the nearest (`seed` is `None`): for Kahan summation, where the update keeps what rounding lost.

    Args:
        seed (`int`, *optional*): Of the noise: another for every step and list of tensors, the same on all ranks.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def concerns(self, dtype: torch.dtype) -> bool:
        """Whether parameters of this dtype are rounded in another way than to the nearest, or keep what is lost."""
        return dtype == torch.bfloat16 or (dtype == torch.float16 and self.seed is None)

    def before(self, values: Tensor, dtype: torch.dtype) -> None:
        """
        Prepares float32 values, in place, for being copied to a parameter of `dtype`.

        Raises:
            `RuntimeError`: A CUDA graph is captured, which would replay the same noise for ever.
        """
        if self.seed is None or dtype != torch.bfloat16 or values.dtype != torch.float32:
            return
        if values.device not in self.generators:
            self.generators[values.device] = _seeded(values.device, self.seed)
        round_stochastically_(values, self.generators[values.device])


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "stochastic_rounding=True needs new noise in every step, but a CUDA graph is being captured, which would "
            "replay one step's; use kahan_sum=True inside graphs"
        )
    return torch.Generator(device).manual_seed(seed)


def round_stochastically_(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """
    Rounds float32 numbers, in place, to one of the two bf16 numbers around each, at random, so that the mean is right.

    bf16 is the upper half of float32: 16 random bits are added to the lower half, which is then cut off. Infinity and
    NaN stay what they are: their lower half is zero, and nothing is carried out of it.

    Args:
        values (`torch.Tensor`): float32, contiguous; any shape.
        generator (`torch.Generator`, *optional*): On the device of `values`. `None`: torch's global one.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits.add_(noise).bitwise_and_(-65536)
    return values
