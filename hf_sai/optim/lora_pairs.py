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
from typing import Literal

import torch
from torch import Tensor, nn

from .checks import check_choice
from .facts import A_RATE


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


def bounded(gradient: Tensor, norm: float, is_a: bool) -> Tensor:
    """
    A factor's gradient over its norm, or over `norm` where that is larger; A's times `A_RATE`.

    Args:
        gradient (`torch.Tensor`): Not written.
        norm (`float`): Of the pair's first gradient, above 0.
        is_a (`bool`): Whether it is A's.

    Returns:
        `torch.Tensor`: In float32 or wider. Nothing is read back from the device.
    """
    wide = _wide(gradient)
    return wide * ((A_RATE if is_a else 1.0) / _norm(wide).clamp(min=norm))


def first_factor(norm: float, gradient_norm: float, is_a: bool) -> float:
    """What [`bounded`] multiplies a gradient of that norm by; `norm` as there."""
    return (A_RATE if is_a else 1.0) / max(norm, gradient_norm)


def norm_of(gradient: Tensor) -> float:
    """The norm, read back from the device; needed until a pair's is known."""
    return _norm(gradient).item()


def _norm(gradient: Tensor) -> Tensor:
    """In float64, where float32 would overflow at 1e19; on devices that have none, in float32."""
    return _wide(gradient).norm(dtype=torch.float32 if gradient.device.type == "mps" else torch.float64)


def _wide(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
