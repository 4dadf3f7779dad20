"""Measuring g-SNR without training, and carrying a learning rate from one normalisation to the other."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
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

    Afterwards all is as it was: weights, gradients (`p.grad`), buffers, modes and random generators. Dropout works as
    the model's mode says.

    Args:
        model (`torch.nn.Module`): On its device.
        batches (iterable): What `loss_fn` takes; dicts for `model(**batch)`, which gives a loss, where it is left out.
        loss_fn (callable, *optional*): `(model, batch) -> loss`, a scalar tensor. `trainer.compute_loss` is one, for
            the loss that a Trainer trains.
        eps (`float`, *optional*, defaults to 1e-8): Added to the standard deviation.

    Returns:
        `list[TensorGSNR]`: Rows with `scale = gsnr`, which `SGDSaI(gsnr=...)` takes. `step` is the number of the first
        informative batch.

    Raises:
        `ValueError`: There is no batch, no loss, or nothing to train.
    """
    named = trainable_parameters(model)
    params = [param for _, param in named]

    def gradients() -> Iterator[list[Tensor | None]]:
        for batch in batches:
            loss = _loss(model, batch, loss_fn or _own_loss)
            yield list(torch.autograd.grad(loss, params, allow_unused=True))

    with left_as_it_was(model):
        return mean_gsnr(named, gradients(), eps)


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """
    What there is to measure, by name.

    Raises:
        `ValueError`: Nothing.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError("measuring g-SNR needs a parameter with requires_grad, but the model has none; unfreeze some")
    return named


def mean_gsnr(
    named: list[tuple[str, nn.Parameter]], gradients: Iterable[list[Tensor | None]], eps: float = 1e-8
) -> list[TensorGSNR]:
    """
    g-SNR of some gradients of the same tensors, each tensor's mean over its informative ones.

    Args:
        named (`list` of pairs): Names and parameters.
        gradients (iterable of lists): One gradient per parameter, or `None`. Read once, one after the other.
        eps (`float`, *optional*, defaults to 1e-8): Added to the standard deviation.

    Returns:
        `list[TensorGSNR]`: As [`measure_gsnr`].

    Raises:
        `ValueError`: There are no gradients at all.
    """
    samples: list[list[float]] = [[] for _ in named]
    first_batch = [0] * len(named)
    constant = [False] * len(named)
    number = 0
    for number, found in enumerate(gradients, start=1):
        present = [(index, gradient) for index, gradient in enumerate(found) if gradient is not None]
        for (index, _), moments in zip(present, gradient_moments([each for _, each in present]), strict=True):
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


def _loss(model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    """The loss of one batch, which stays whole: a Trainer's `compute_loss` takes the labels out of its dict."""
    loss = loss_fn(model, copy.copy(batch) if isinstance(batch, Mapping) else batch)
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(
            f"measuring g-SNR needs one number with a gradient as the loss, but got {what}; pass loss_fn=, from the "
            "model and a batch to it"
        )
    return loss


def _own_loss(model: nn.Module, batch: Any) -> Any:
    """What the model gives as its loss, as Hugging Face's do."""
    outputs = model(**batch) if isinstance(batch, Mapping) else None
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        given = f"with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"of a {type(batch).__name__}"
        raise ValueError(
            f"measuring g-SNR needs a loss, but {type(model).__name__} gives none for a batch {given}; pass "
            "loss_fn=, such as a Trainer's compute_loss"
        )
    return loss


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """
    Whatever is measured while it is open, afterwards gradients, buffers and modes of the model and all random
    generators (Python's, NumPy's, torch's on every device) are as before.
    """
    grads = [(param, param.grad) for param in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with _kept_random_numbers():
        try:
            yield
        finally:
            for param, grad in grads:
                param.grad = grad
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer
                    buffer.copy_(value)


@contextlib.contextmanager
def _kept_random_numbers() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    of_python, of_torch = random.getstate(), torch.get_rng_state()
    of_numpy = numpy.random.get_state() if numpy is not None else None
    device: Any = torch.get_device_module() if torch.accelerator.is_available() else None
    every = "_all" if hasattr(device, "get_rng_state_all") else ""  # MPS has one device
    of_devices = getattr(device, f"get_rng_state{every}")() if device is not None else None
    try:
        yield
    finally:
        random.setstate(of_python)
        torch.set_rng_state(of_torch)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
        if device is not None:
            getattr(device, f"set_rng_state{every}")(of_devices)


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
