"""
What a model's memory depends on, as data: its trained tensors by shape, and the bytes of the rest.

Of the named models, and of the LLaMAs that a card is filled with, it stands in a table or follows from a formula, so
that nothing is built and neither torch nor transformers is imported. [`hf_sai.model_build`] makes it of any other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .quantization import quantization_of


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# SWAN's routes of a LoRA factor, as `route_parameters` gives them by its default policy.
LORA_ROUTES = ("adam", "matrix, transposed")


@dataclass(frozen=True)
class Tensors:
    """Trained tensors that are alike."""

    shape: tuple[int, ...]  # of each
    dtype: str  # such as "float32"
    count: int
    route: str  # where SWAN takes them, as in hf_sai.optim.Route
    embedding: bool = False  # whether they are tables of nn.Embedding

    @property
    def numel(self) -> int:
        """Elements of one."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of one."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ModelShapes:
    """What a training's memory depends on."""

    trained: tuple[Tensors, ...]
    parameters: int  # elements of all parameters, tied ones once, adapters included
    weights: int  # bytes of all parameters and buffers
    dtype: str  # of the weights, as they are loaded
    activations: int | None  # bytes that a forward pass leaves for the backward pass; None: they can't be counted
    sequence: int | None = None  # tokens of an example in that pass; None of pictures
    note: str = ""  # what a reader has to know, in sentences, such as why activations are not counted

    @property
    def trained_parameters(self) -> int:
        """Elements of what trains."""
        return sum(row.count * row.numel for row in self.trained)

    @property
    def gradients(self) -> int:
        """Bytes of all gradients, which are in the dtype of what they belong to."""
        return sum(row.count * row.bytes for row in self.trained)


@dataclass(frozen=True)
class Training:
    """How a model is to be trained."""

    dtype: str | None = None  # of the weights; None: as from_pretrained takes it, the configuration's or float32
    lora_rank: int | None = None  # of adapters, all else is frozen; None trains every tensor
    lora_targets: str = "all-linear"  # as PEFT's target_modules takes them; names with commas between
    quantization: str | None = None  # of the frozen weights, of QUANTIZATIONS; None: what the configuration says
    batch: int = 1  # examples in one forward pass
    sequence: int | None = None  # tokens of each; None: 1024, or as many as the model takes
    gradient_checkpointing: bool = False  # layers are computed again in the backward pass


DEFAULT_SEQUENCE = 1024
# GB of state in arXiv 2412.11768: SGD-SaI's, AdamW's; float32.
PUBLISHED = {"gpt2-xl": (5.93, 11.86), "llama-2-7b": (25.15, 49.48)}


@functools.cache
def _tables() -> dict[str, Any]:
    text = (Path(__file__).parent / "named_models.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def named_models() -> list[str]:
    """Names that [`named_shapes`] knows."""
    return list(_tables()["models"])


def named_shapes(name: str, training: Training | None = None) -> ModelShapes:
    """
    One of [`named_models`], from the table that `tools/write_tables.py` writes; adapters go to all linear layers. An
    option that the table does not answer is a `ValueError`.
    """
    return _shapes(_tables()["models"][name], training or Training())


def llama_shapes(layers: int, training: Training | None = None) -> ModelShapes:
    """A LLaMA of Llama-2's proportions: `layers` layers, 128 times as wide; with 32 it is Llama-2-7B."""
    width, vocabulary = 128 * layers, 32000
    inner = -(-width * 8 // (3 * 256)) * 256
    linear = {"route": "matrix", "lora": True}
    rows = [
        {"shape": [vocabulary, width], "count": 1, "route": "adam", "embedding": True},
        {"shape": [width, width], "count": 4 * layers, **linear},
        {"shape": [inner, width], "count": 2 * layers, **linear},
        {"shape": [width, inner], "count": layers, **linear},
        {"shape": [width], "count": 2 * layers + 1, "route": "adam"},
        {"shape": [vocabulary, width], "count": 1, "route": "adam"},
    ]
    sizes = {"layers": layers, "hidden": width, "inner": inner, "heads": layers, "kv": width, "head_dim": 128}
    sizes |= {"vocabulary": vocabulary, "one": 1}
    fixed = {"tokens": None, "longest": 2048, "family": "llama", "sizes": sizes}
    return _shapes({"tensors": rows, "buffers": _tables()["llama_buffers"], **fixed}, training or Training())


def _shapes(model: dict[str, Any], training: Training) -> ModelShapes:
    """From a row of the table."""
    _check(model, training)
    dtype = training.dtype or "float32"
    packing, _ = quantization_of(None, training.quantization)
    trained, weights, parameters = [], model["buffers"], 0
    for row in model["tensors"]:
        base = Tensors(tuple(row["shape"]), dtype, row["count"], row["route"], row.get("embedding", False))
        rows = [base] if training.lora_rank is None else []
        parameters += base.count * base.numel
        outputs, inputs = base.shape[0], base.shape[-1]
        if row.get("transposed"):
            outputs, inputs = inputs, outputs
        target = bool(row.get("lora"))
        weights += base.count * (packing(outputs, inputs) if packing is not None and target else base.bytes)
        if training.lora_rank is not None and target:
            rows = _factors(outputs, inputs, training.lora_rank, base.count)
            weights += sum(each.count * each.bytes for each in rows)
            parameters += sum(each.count * each.numel for each in rows)
        trained += rows
    sequence = None if model["tokens"] else training.sequence or min(DEFAULT_SEQUENCE, model["longest"])
    activations = _activations(model, training, dtype, training.batch * (sequence or model["tokens"]))
    return ModelShapes(merged(trained), parameters, weights, dtype, activations, sequence)


def _check(model: dict[str, Any], training: Training) -> None:
    """Refuses what the table can't answer."""
    if training.lora_targets != "all-linear":
        raise ValueError(
            f"a named model's adapters are on all linear layers, but the targets are {training.lora_targets!r}; give "
            "a folder or repository with its config.json instead"
        )
    if training.quantization not in (None, "none") and training.lora_rank is None:
        raise ValueError("quantised weights can't be trained themselves; add adapters: --lora 16")
    if training.sequence is not None and model["tokens"]:
        raise ValueError(f"a picture has {model['tokens']} tokens here, and a sequence can't be given; leave it out")


def _factors(outputs: int, inputs: int, rank: int, count: int) -> list[Tensors]:
    """LoRA's A and B of linear layers, in float32 whatever these are, as PEFT makes them."""
    return [
        Tensors((rank, inputs), "float32", count, LORA_ROUTES[0]),
        Tensors((outputs, rank), "float32", count, LORA_ROUTES[1]),
    ]


def _activations(model: dict[str, Any], training: Training, dtype: str, tokens: int) -> int:
    """
    Bytes by the formula of the family: per token and layer a multiple of each of its sizes, and as much once for head
    and loss.
    """
    sizes = model["sizes"]
    kind = f"{'full' if training.lora_rank is None else 'lora'}, {8 * DTYPE_BYTES[dtype]} bits"
    factors = _tables()["activations"][model["family"]][kind]
    rank = training.lora_rank or 0
    layer = sum(factors["layer"].get(name, 0) * value for name, value in {**sizes, "rank": rank}.items())
    once = sum(factors["once"].get(name, 0) * value for name, value in sizes.items())
    kept = sizes["layers"] * layer
    if training.gradient_checkpointing:  # each layer's input, and one layer that is computed again
        kept = sizes["layers"] * sizes["hidden"] * DTYPE_BYTES[dtype] + layer
    return round(tokens * (kept + once))


def merged(rows: list[Tensors]) -> tuple[Tensors, ...]:
    """Rows that are alike put together."""
    counts: Counter[Tensors] = Counter()
    for row in rows:
        counts[dataclasses.replace(row, count=0)] += row.count
    return tuple(dataclasses.replace(key, count=count) for key, count in counts.items())
