"""
What a forward pass leaves in memory for the backward pass, counted on the meta device: the model runs there, and what
autograd keeps is added up.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .model_shapes import DEFAULT_SEQUENCE


_PER_TOKEN_OF_SOUND = 320  # samples, as wav2vec2's convolutions have it


class _Kept:
    """Storages that are kept, each once, without those of the model itself."""

    def __init__(self, own: set[int]) -> None:
        self.own = own
        self.storages: dict[int, tuple[Any, torch.dtype]] = {}

    def add(self, value: Any) -> None:
        """A tensor, or what holds some."""
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage._cdata not in self.own:
                self.storages.setdefault(storage._cdata, (storage, value.dtype))
        elif isinstance(value, dict):
            for each in value.values():
                self.add(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                self.add(each)

    def bytes(self, but: _Kept | None = None) -> int:
        """All of them, or what another one has not."""
        known = {} if but is None else but.storages
        return sum(storage.nbytes() for key, (storage, _) in self.storages.items() if key not in known)

    def largest(self) -> int:
        """Bytes of the largest that has a gradient."""
        return max(
            (storage.nbytes() for storage, dtype in self.storages.values() if dtype.is_floating_point), default=0
        )

    def hooks(self) -> Any:
        """While they are open, what autograd keeps is added."""

        def pack(tensor: Tensor) -> Tensor:
            self.add(tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


class _Attention(torch.autograd.Function):
    """Keeps what the kernels keep that hold no table of scores: query, key, value, output, a sum per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError


class _GroupedProduct(torch.autograd.Function):
    """A product for each expert, whose kernel the meta device has in bfloat16 alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows if weights.requires_grad else None, weights)
        return rows.new_empty(*rows.shape[:-1], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """
    In the place of `scaled_dot_product_attention`. Tensors of other than four dimensions, and a bias that is trained
    (T5's), go to the kernel that keeps the scores.
    """
    if query.ndim != 4 or (attn_mask is not None and attn_mask.requires_grad):
        return _original(query, key, value, attn_mask, *args, **kwargs)
    found: Tensor = _Attention.apply(query, key, value)
    return found


def _grouped_product(rows: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of `grouped_mm`."""
    found: Tensor = _GroupedProduct.apply(rows, weights)
    return found


class _Ones(TorchDispatchMode):
    """A number that is read on the meta device is 1 (true): a mask hides nothing, a sequence is not packed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        return func(*args, **(kwargs or {}))


class _Autocast(torch.autocast):
    """`torch.autocast` for the meta device too, which has none: PEFT and models turn it off for a part of theirs."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


_original = nn.functional.scaled_dot_product_attention
_REPLACED = (
    (nn.functional, "scaled_dot_product_attention", _attention),
    (nn.functional, "grouped_mm", _grouped_product),
    (torch, "_grouped_mm", _grouped_product),
    (torch, "autocast", _Autocast),
)


@contextlib.contextmanager
def _counted_kernels() -> Iterator[None]:
    """Kernels that the meta device has not, or not as an accelerator runs them, replaced by what they keep."""
    kernels = [(home, name, getattr(home, name), ours) for home, name, ours in _REPLACED if hasattr(home, name)]
    try:
        for home, name, _, ours in kernels:
            setattr(home, name, ours)
        yield
    finally:
        for home, name, theirs, _ in kernels:
            setattr(home, name, theirs)


def forward_bytes(model: nn.Module, batch: int, sequence: int | None, checkpointing: bool) -> tuple[int | None, str]:
    """
    Bytes that a training's forward pass leaves, output and loss included, and the first gradient of the backward pass,
    with `""`; or `None` and the reason.

    Args:
        model (`torch.nn.Module`): On the meta device, of transformers, with or without an adapter of PEFT. It is
            changed by `checkpointing`.
        batch (`int`): Examples.
        sequence (`int`, *optional*): Tokens of each; of sound, frames of 20 ms; not of pictures.
        checkpointing (`bool`): Whether layers keep their input alone; the largest one is then counted once.
    """
    kept = _Kept({each.untyped_storage()._cdata for each in [*model.parameters(), *model.buffers()]})
    again = 0

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal again
        kept.add(args)
        inner = _Kept(kept.own)
        with inner.hooks():
            output = function(*args, **kwargs)
        again = max(again, inner.bytes(kept))
        return output

    model.train()
    try:
        if checkpointing:
            _use_checkpoints(model, checkpoint)
        output = _forward(model, batch, sequence, kept)
    except Exception as error:  # a model's forward pass may look at numbers, which the meta device has not
        name = type(_inner(model)).__name__
        return None, f"{name} does not run on the meta device with plain inputs ({type(error).__name__})"
    kept.add(output)
    return kept.bytes() + again + kept.largest(), ""


def _use_checkpoints(model: Any, checkpoint: Callable[..., Any]) -> None:
    # The first since transformers 5.2x, which warns of the second.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = checkpoint


def _forward(model: Any, batch: int, sequence: int | None, kept: _Kept) -> Any:
    """Runs with labels where the model takes some and its loss runs on the meta device; else without."""
    inputs, labels = model_inputs(model, batch, sequence)
    attempts = [{**inputs, "labels": each} for each in labels] + [inputs] + _other_inputs(model, inputs)
    error: Exception | None = None
    with _counted_kernels(), _Ones():
        for given in attempts:
            try:
                with kept.hooks():
                    return model(**given)
            except Exception as failed:
                error = failed if given is inputs else error
                kept.storages.clear()
    raise error or ValueError("the model takes none of the inputs")


def _other_inputs(model: Any, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """For models that want a picture beside the text, or the frames of a spectrum before its bands."""
    found, some = [], next(iter(inputs.values()))
    if "pixel_values" not in inputs and "pixel_values" in inspect.signature(_inner(model).forward).parameters:
        picture = _main_input("pixel_values", model.config, len(some), some, str(some.device))
        found.append({**inputs, "pixel_values": picture})
    if "input_features" in inputs:
        found.append({**inputs, "input_features": inputs["input_features"].mT})
    return found


def sequence_of(model: Any, asked: int | None) -> int | None:
    """Tokens of an example: as asked, or 1024, or as many as the model takes; `None` of pictures alone."""
    forward = inspect.signature(_inner(model).forward).parameters
    if "pixel_values" in forward and "input_ids" not in forward:
        return None
    text = model.config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    longest = next((size for size in sizes if isinstance(size, int) and size > 1), DEFAULT_SEQUENCE)
    return asked or min(DEFAULT_SEQUENCE, longest)


def model_inputs(
    model: Any, batch: int, sequence: int | None, device: str = "meta"
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What the forward pass of a model of transformers takes, made on a device, and labels to try in turn."""
    config = model.config
    length = sequence_of(model, sequence) or 1
    forward = inspect.signature(_inner(model).forward).parameters
    tokens = torch.ones(batch, length, dtype=torch.long, device=device)
    one = torch.zeros(batch, dtype=torch.long, device=device)
    main = getattr(model, "main_input_name", "input_ids")
    name = main if main in forward else next((each for each in ("input_ids", "pixel_values") if each in forward), main)
    inputs = {name: _main_input(name, config, batch, tokens, device)}
    if "decoder_input_ids" in forward:
        inputs["decoder_input_ids"] = tokens
    if name != "input_ids" and "input_ids" in forward:
        inputs["input_ids"] = tokens
    return inputs, [tokens, one] if "labels" in forward else []


def _inner(model: Any) -> Any:
    """The model that PEFT's wrappers hand everything through to."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _main_input(name: str, config: Any, batch: int, tokens: Tensor, device: str) -> Tensor:
    """Text, a picture, samples of sound or its spectrum."""
    sizes = getattr(config, "vision_config", config)
    if name == "pixel_values":
        size = getattr(sizes, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return torch.empty(batch, getattr(sizes, "num_channels", None) or 3, height, width, device=device)
    if name == "input_values":
        return torch.empty(batch, tokens.shape[1] * _PER_TOKEN_OF_SOUND, device=device)
    if name == "input_features":
        mels = getattr(config, "num_mel_bins", None) or 80
        return torch.empty(batch, mels, 2 * (getattr(config, "max_source_positions", None) or 1500), device=device)
    return tokens
