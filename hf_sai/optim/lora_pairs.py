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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..optimizer_facts import A_RATE
from .checks import check_choice
from .tensors import fetch, upload


PairPolicy = Literal["plain", "paired"]
PAIR_POLICIES = ("plain", "paired")


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
        _refuse_odd_adapters(model)
        raise ValueError(
            "lora_policy='paired' needs a layer with lora_A and lora_B that are both trained, but the model has none; "
            "pass the model with its adapter, or leave lora_policy out"
        )
    return list(pairs.values())


def _refuse_odd_adapters(model: nn.Module) -> None:
    """Raises `ValueError` with the true reason for adapters whose trained tensors are not two factors A and B."""
    kinds = sorted(
        {
            config.peft_type.split(".")[-1] if isinstance(config.peft_type, str) else str(config.peft_type)
            for module in model.modules()
            for config in getattr(module, "peft_config", {}).values()
            if getattr(config, "peft_type", None) is not None
        }
        if any(isinstance(getattr(module, "peft_config", None), dict) for module in model.modules())
        else ()
    )
    for module in model.modules():
        if isinstance(getattr(module, "lora_E", None), nn.ParameterDict):
            raise ValueError(
                "lora_policy='paired' needs a product of two factors, but AdaLoRA has a third between them, lora_E, "
                "and starts with it at zero; leave lora_policy out, or use LoRA"
            )
    if kinds and kinds != ["LORA"]:
        raise ValueError(
            f"lora_policy='paired' needs LoRA's lora_A and lora_B that are both trained, but the adapter is "
            f"{', '.join(kinds)}, which has none; leave lora_policy out, or use LoRA"
        )


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


def bounded_pairs(
    pairs: Sequence[tuple[Tensor, Tensor]], states: Mapping[Tensor, dict[str, Any]]
) -> dict[Tensor, Tensor]:
    """
    The gradients of LoRA's factors, bounded by the norm of each pair's first.

    Args:
        pairs (sequence of pairs of `torch.Tensor`): A and B, with their gradients, or `None`.
        states (mapping): Of the factors, without those that were never trained. `pair_norm` is written as soon as it
            is known, which it is when all gradients of the pair are finite and one is not zero.

    Returns:
        `dict[torch.Tensor, torch.Tensor]`: By factor. None of a pair whose gradients are all zero, or not finite.
    """
    of_pair = [[state for param in pair if (state := states.get(param))] for pair in pairs]
    known = [max((state["pair_norm"] for state in each), default=0.0) for each in of_pair]
    new = [(index, param.grad) for index, pair in enumerate(pairs) if not known[index] for param in pair]
    present = [(index, grad) for index, grad in new if grad is not None]
    measured: dict[int, list[float]] = {}
    for (index, _), norm in zip(present, norms([grad for _, grad in present]), strict=True):
        measured.setdefault(index, []).append(norm)
    for index, of_factors in measured.items():
        known[index] = max((norm for norm in of_factors if math.isfinite(norm)), default=0.0)
        if known[index] and all(map(math.isfinite, of_factors)):  # else the pair waits; now it is bounded by itself
            for state in of_pair[index]:
                state["pair_norm"] = known[index]
    rows = [
        (param, param.grad, norm, position == 0)
        for pair, norm in zip(pairs, known, strict=True)
        for position, param in enumerate(pair)
        if norm and param.grad is not None
    ]
    return dict(zip([row[0] for row in rows], bounded([row[1:] for row in rows]), strict=True))


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
        least, rate = upload(torch.tensor(numbers, dtype=_sum_dtype(stack)), stack.device)
        factor = (rate / torch.maximum(_row_norms(stack), least)).to(stack.dtype)
        stack *= factor.view(-1, *[1] * (stack.ndim - 1))
        for index, part in zip(indices, stack.unbind(0), strict=True):
            found[index] = part
    return found


def first_factor(norm: float, gradient_norm: float, is_a: bool) -> float:
    """What [`bounded`] multiplies a gradient of that norm by; `norm` as there."""
    return (A_RATE if is_a else 1.0) / max(norm, gradient_norm)


def finite_norms(gradients: Sequence[Tensor]) -> list[float]:
    """As [`norms`], with 0 where one is not finite."""
    return [norm if math.isfinite(norm) else 0.0 for norm in norms(gradients)]


def norms(gradients: Sequence[Tensor]) -> list[float]:
    """Norms, read back from the device at once; needed until a pair's is known."""
    found = [0.0] * len(gradients)
    by_device: dict[torch.device, list[tuple[list[int], Tensor]]] = {}
    for indices, stack in _stacks(gradients):
        by_device.setdefault(stack.device, []).append((indices, _row_norms(stack)))
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
    return torch.linalg.vector_norm(stack.flatten(1), dim=1, dtype=_sum_dtype(stack))


def _sum_dtype(stack: Tensor) -> torch.dtype:
    """float64, since float32 would overflow at 1e19; float32 on devices that have no other."""
    return torch.float32 if stack.device.type == "mps" else torch.float64
