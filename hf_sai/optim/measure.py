"""Measuring g-SNR without training, and carrying a learning rate from one normalisation to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_choice, check_number
from .gsnr import NORMALIZATIONS, TensorGSNR, fallback_snr, gradient_moments, gradient_snr


def measure_gsnr(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    eps: float = 1e-8,
) -> list[TensorGSNR]:
    """
    Measures g-SNR without training: the mean over the batches, each tensor over its informative gradients.

    Weights, gradients (`p.grad`) and buffers of the optimizer are not touched. Dropout is left as the model has it.

    Args:
        model (`torch.nn.Module`): On its device.
        batches (iterable): What `loss_fn` takes; dicts for `model(**batch).loss` where it is left out.
        loss_fn (callable, *optional*): `(model, batch) -> loss`, a scalar tensor.
        eps (`float`, *optional*, defaults to 1e-8): Added to the standard deviation.

    Returns:
        `list[TensorGSNR]`: Rows with `scale = gsnr`, which `SGDSaI(gsnr=...)` takes. `step` is the number of the first
        informative batch.

    Raises:
        `ValueError`: There is no batch, or nothing to train.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError("measuring g-SNR needs a parameter with requires_grad, but the model has none; unfreeze some")
    samples: list[list[float]] = [[] for _ in named]
    first_batch = [0] * len(named)
    constant = [False] * len(named)
    number = 0
    for number, batch in enumerate(batches, start=1):
        loss = loss_fn(model, batch) if loss_fn is not None else model(**batch).loss
        found = torch.autograd.grad(loss, [param for _, param in named], allow_unused=True)
        present = [index for index, gradient in enumerate(found) if gradient is not None]
        for index, moments in zip(present, gradient_moments([found[index] for index in present]), strict=True):
            if moments.is_finite and not moments.is_zero:
                first_batch[index] = first_batch[index] or number
                constant[index] = constant[index] or moments.is_constant
                samples[index].append(fallback_snr(moments) if moments.is_constant else gradient_snr(moments, eps))
    if number == 0:
        raise ValueError("measuring g-SNR needs a batch, but there was none; pass at least one")
    rows = []
    for (name, param), snrs, first, is_constant in zip(named, samples, first_batch, constant, strict=True):
        mean = sum(snrs) / len(snrs) if snrs else 0.0
        status = "pending" if not snrs else "fallback" if is_constant else "measured"
        rows.append(TensorGSNR(name, tuple(param.shape), param.numel(), 0, mean, mean, first, status))
    return rows


def convert_lr(
    lr: float,
    from_: Literal["none", "max", "rms"],
    to: Literal["none", "max", "rms"],
    statistics: Iterable[TensorGSNR],
    gsnr_rms: float = 0.0,
) -> float:
    """
    The learning rate that gives the same updates under another normalisation.

    Args:
        lr (`float`): Under `from_`.
        from_ (`str`): `"none"`, `"max"` or `"rms"`.
        to (`str`): Likewise.
        statistics (iterable of `TensorGSNR`): Of the model that is trained; rows of a g-SNR report do as well.
        gsnr_rms (`float`, *optional*): What `"rms"` divides by, which the rows do not say; a group of the optimizer
            holds it under that name, after its first step.

    Returns:
        `float`: `lr` times what `to` divides g-SNR by, over what `from_` divides it by: 1, the largest measured g-SNR,
        or `gsnr_rms`.

    Raises:
        `ValueError`: A normalisation is not known, nothing was measured, or `gsnr_rms` is needed and not there.
    """
    for given in (from_, to):
        check_choice("a normalisation", given, NORMALIZATIONS)
    if from_ == to:
        return lr
    if "rms" in (from_, to):
        check_number(
            "gsnr_rms",
            gsnr_rms,
            "pass optimizer.param_groups[0]['gsnr_rms'] of a run that has made one step",
            positive=True,
        )
    largest = max((row.gsnr for row in statistics if row.status in ("measured", "given")), default=0.0)
    if largest == 0.0 and "max" in (from_, to):
        raise ValueError(
            "converting a learning rate needs a measured g-SNR, but none is; take one training step first"
        )
    divisors = {"none": 1.0, "max": largest, "rms": gsnr_rms}
    return lr * divisors[to] / divisors[from_]
