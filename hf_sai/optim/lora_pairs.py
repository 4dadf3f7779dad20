"""
The two factors of a LoRA adapter, as SGD-SaI trains them under `lora_policy="paired"`.

An adapter adds `s B A` to a weight whose gradient is `G`, so that the factors have the gradients `s G A^T` and
`s B^T G`: each is proportional to the other factor, while g-SNR has no unit and is measured once, for A when B had
just left zero. So nothing tells SGD-SaI how large a step is: the first gradients of the B of one model differ by 8
times and more, the layers with the largest overshoot first, and from then on each factor's step grows with the other
one, without end (`benchmarks/lora_steps.py`). Two things are done about it, to the gradients, before SGD-SaI sees
them; with `u` for the norm of the first gradient of a pair (B's, where B starts at zero):

    g <- g / max(||g||, u)       a step has an RMS of at most lr, and the first one of lr, in every layer
    g <- A_RATE * g, for A       the less A runs ahead of B, the larger the rate that can be borne (LoRA+ has it too)

(RMS but for what g-SNR says beyond the root of the size.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_choice
from .tensors import fetch, upload


PairPolicy = Literal["plain", "paired"]
PAIR_POLICIES = ("plain", "paired")
# A's learning rate as a multiple of B's. 0.1, 0.3 and 1 were tried on seed 0 at r = 4; docs/lora.md has 0.3 beside 1.
A_RATE = 0.3


def adapter_pairs(model: nn.Module, lora_policy: PairPolicy = "plain") -> list[tuple[Tensor, Tensor]]:
    """
    The factors of a model's adapters that SGD-SaI trains as pairs, by module identity.

    Args:
        model (`torch.nn.Module`): With PEFT's adapters.
        lora_policy (`str`, *optional*, defaults to `"plain"`): `"plain"` takes none: each tensor is trained by itself,
            as the paper has it. `"paired"` takes every layer's A and B of which both are trained. Adapters of
            embeddings, DoRA's magnitudes and all that is no adapter stay as they are.

    Raises:
        `ValueError`: The policy is not known, or `"paired"` finds no pair.
    """
    check_choice("lora_policy", lora_policy, PAIR_POLICIES)
    if lora_policy == "plain":
        return []
    pairs: dict[Tensor, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        factors = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not all(isinstance(each, nn.ModuleDict) for each in factors):
            continue
        for name in factors[0]:  # type: ignore[union-attr]
            a, b = (each[name].weight for each in factors)  # type: ignore[index]
            if a.requires_grad and b.requires_grad:
                pairs[a] = (a, b)
    if not pairs:
        raise ValueError(
            "lora_policy='paired' needs a layer with lora_A and lora_B that are both trained, but the model has none; "
            "pass the model with its adapter, or leave lora_policy out"
        )
    return list(pairs.values())


def check_pairs(params: list[Tensor]) -> None:
    """
    Checks that a group alternates A `(r, in, ...)` and B `(out, r, ...)`.

    Raises:
        `ValueError`: It does not.
    """
    shapes = [tuple(param.shape) for param in params]
    pairs = list(zip(shapes[::2], shapes[1::2], strict=False))
    odd = [pair for pair in pairs if min(map(len, pair)) < 2 or pair[0][0] != math.prod(pair[1][1:])]
    if len(shapes) % 2 or odd:
        found = f"holds {odd[0][0]} before {odd[0][1]}" if odd else f"holds {len(shapes)} tensors"
        raise ValueError(
            f"a group with paired=True must alternate A of shape (r, in) and B of shape (out, r) but {found}; "
            "hf_sai.param_groups(model, 'sgd_sai', lora_policy='paired') makes them"
        )


def bounded(rows: Sequence[tuple[Tensor, float, bool]]) -> list[Tensor]:
    """
    Factors' gradients over their norms, or over the pair's norm where that is larger; A's times `A_RATE`.

    Gradients of one shape are taken together, in a few calls. Nothing is read back from the device.

    Args:
        rows (sequence of tuples): A gradient, which is not written; the norm of its pair's first one, above 0; and
            whether it is A's.

    Returns:
        `list[torch.Tensor]`: In float32 or wider.
    """
    found: list[Tensor] = [grad for grad, *_ in rows]
    for indices, stack in _stacks(found):
        numbers = [[rows[i][1] for i in indices], [A_RATE if rows[i][2] else 1.0 for i in indices]]
        least, rate = upload(torch.tensor(numbers, dtype=stack.dtype), stack.device)
        factor = rate / torch.maximum(_row_norms(stack), least)
        stack *= factor.view(-1, *[1] * (stack.ndim - 1))
        for index, part in zip(indices, stack.unbind(0), strict=True):
            found[index] = part
    return found


def norms(gradients: Sequence[Tensor]) -> list[float]:
    """Norms, read back from the device at once; needed until a pair's is known."""
    found = [0.0] * len(gradients)
    by_device: dict[torch.device, list[tuple[list[int], Tensor]]] = {}
    for indices, stack in _stacks(gradients):
        by_device.setdefault(stack.device, []).append((indices, _row_norms(stack).double()))
    for parts in by_device.values():
        values = fetch(torch.cat([part for _, part in parts]))
        for index, value in zip([i for indices, _ in parts for i in indices], values, strict=True):
            found[index] = value
    return found


def _stacks(gradients: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Gradients of one shape, dtype and device, copied to float32 or wider; which they are, and the stack."""
    alike: dict[Any, list[int]] = {}
    for index, gradient in enumerate(gradients):
        alike.setdefault((gradient.shape, gradient.dtype, gradient.device), []).append(index)
    for indices in alike.values():
        first = gradients[indices[0]]
        stack = torch.stack([gradients[i] for i in indices])
        yield indices, stack.to(torch.promote_types(first.dtype, torch.float32))


def _row_norms(stack: Tensor) -> Tensor:
    return torch.linalg.vector_norm(stack.flatten(1), dim=1)
