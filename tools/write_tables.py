"""
Writes what the command line needs to know without importing torch or transformers: `hf_sai/optimizers.json` from the
records, and `hf_sai/named_models.json` from models that are built on the meta device.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sai.activations import forward_bytes
from hf_sai.optim import route_parameters
from hf_sai.optim.registry import list_records


PACKAGE = Path(__file__).parent.parent / "hf_sai"
VIT_S = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_labels": 1000}
VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "num_labels": 1000,
}
LLAMA_3 = {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-2-7b": ("llama", {"max_position_embeddings": 4096}),
    "llama-3-8b": ("llama", LLAMA_3),
    "vit-s-16": ("vit", VIT_S),
    "vit-h-14": ("vit", VIT_H),
}
FAMILIES: dict[str, tuple[type[Any], type[Any]]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "vit": (ViTConfig, ViTForImageClassification),
}
# Small models whose activations tell the factors of each size: layers, hidden, inner, heads, key-value heads.
PROBES = [(1, 64, 160, 4, 4), (2, 64, 160, 4, 4), (1, 128, 160, 4, 4), (1, 64, 320, 4, 4), (1, 64, 160, 8, 4)]
PROBES += [(1, 64, 160, 8, 8), (2, 128, 160, 4, 4), (2, 64, 320, 4, 4), (2, 64, 160, 8, 4), (2, 64, 160, 8, 8)]
VOCABULARIES, RANKS, PROBE_TOKENS = (1000, 2000), (4, 8), 256


def build(family: str, sizes: dict[str, Any], dtype: torch.dtype = torch.float32, rank: int | None = None) -> Any:
    """A model on the meta device, buffers as they are built."""
    config_class, model_class = FAMILIES[family]
    with torch.device("meta"):
        model = model_class(config_class(**sizes))
        for param in model.parameters():
            param.data = param.data.to(dtype)
        return model if rank is None else get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


def named_model(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: tensors that are alike, and the sizes that its activations follow from."""
    model = build(family, sizes)
    config = model.config
    routes = {row.param: row.route for row in route_parameters(model)}
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    params = list(model.parameters())
    buffers = sum(each.numel() * each.element_size() for each in model.buffers())
    targets = {}
    for module in get_peft_model(model, LoraConfig(r=1, target_modules="all-linear")).modules():
        if hasattr(module, "lora_A"):
            targets[module.get_base_layer().weight] = type(module.get_base_layer()).__name__ == "Conv1D"
    rows: dict[str, dict[str, Any]] = {}
    for param in params:
        row: dict[str, Any] = {"shape": list(param.shape), "count": 0, "route": routes[param]}
        row |= {"embedding": True} if param in tables else {}
        row |= {"lora": True} if param in targets else {}
        row |= {"transposed": True} if targets.get(param) else {}
        rows.setdefault(json.dumps(row), row)["count"] += 1
    patches = None if family != "vit" else (config.image_size // config.patch_size) ** 2 + 1
    heads = config.num_attention_heads
    return {
        "family": family,
        "buffers": buffers,
        "tokens": patches,
        "longest": getattr(config, "max_position_embeddings", None),
        "sizes": {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "inner": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            "heads": heads,
            "kv": config.hidden_size * getattr(config, "num_key_value_heads", heads) // heads,
            "head_dim": config.hidden_size // heads,
            "vocabulary": getattr(config, "vocab_size", 0),
            "one": 1,
        },
        "tensors": list(rows.values()),
    }


def probe(family: str, probe: tuple[int, ...], vocabulary: int) -> dict[str, Any]:
    """Arguments of a small model's configuration."""
    layers, hidden, inner, heads, kv = probe
    if family == "gpt2":
        sizes = {"n_layer": layers, "n_embd": hidden, "n_inner": inner, "n_head": heads, "n_positions": PROBE_TOKENS}
        return {**sizes, "vocab_size": vocabulary}
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    sizes["num_attention_heads"] = heads
    if family == "vit":
        return {**sizes, "image_size": 240, "patch_size": 16, "num_labels": 10}
    return {**sizes, "num_key_value_heads": kv, "vocab_size": vocabulary}


def activation_factors(family: str, dtype: torch.dtype, lora: bool) -> dict[str, dict[str, int]]:
    """Bytes per token: of a layer and once, by size; least squares over the probes."""
    tokens = 226 if family == "vit" else PROBE_TOKENS
    equations, found = [], []
    for layers, hidden, width, heads, kv in PROBES:
        inner = width * (10 if family == "vit" else 1)  # as in a large one, above a patch's pixels
        for vocabulary in VOCABULARIES if family != "vit" else (0,):
            for rank in RANKS if lora else (0,):
                sizes = probe(family, (layers, hidden, inner, heads, kv), vocabulary)
                counted, reason = forward_bytes(build(family, sizes, dtype, rank or None), 1, tokens, False)
                assert counted is not None, reason
                layer = [hidden, inner, heads, kv * hidden // heads if family == "llama" else 0, rank, 1]
                once = [hidden, vocabulary, *((inner, 0) if family == "vit" else (0, hidden // heads)), 1]
                equations.append([*(layers * each for each in layer), *once])
                found.append(counted / tokens)
    solved = torch.linalg.lstsq(
        torch.tensor(equations, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)[:, None], driver="gelsd"
    ).solution
    names = ["hidden", "inner", "heads", "kv", "rank", "one", "hidden", "vocabulary", "inner", "head_dim", "one"]
    values = [(name, round(float(value))) for name, value in zip(names, solved[:, 0], strict=True)]
    return {
        "layer": {name: value for name, value in values[:6] if value},
        "once": {name: value for name, value in values[6:] if value},
    }


def model_tables() -> dict[str, Any]:
    """As JSON holds them."""
    kinds = [(lora, dtype) for lora in (False, True) for dtype in (torch.float32, torch.bfloat16)]
    return {
        "models": {name: named_model(*model) for name, model in MODELS.items()},
        "llama_buffers": named_model("llama", {"num_hidden_layers": 1})["buffers"],
        "activations": {
            family: {
                f"{'lora' if lora else 'full'}, {8 * dtype.itemsize} bits": activation_factors(family, dtype, lora)
                for lora, dtype in kinds
            }
            for family in FAMILIES
        },
    }


def files() -> dict[Path, Any]:
    """What stands in each file."""
    return {
        PACKAGE / "optimizers.json": [record.facts for record in list_records()],
        PACKAGE / "named_models.json": model_tables(),
    }


def main() -> None:
    """Writes both."""
    transformers.logging.set_verbosity_error()
    for path, content in files().items():
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
