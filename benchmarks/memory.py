"""
What `hf-sai memory` says against what processes really take: six small models, all weights and LoRA, three optimizers.

Each training is a process of its own. What it takes is its peak resident memory in two steps, less what it had
before the model was there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import command, machine, markdown_table, write_results
from peft import LoraConfig, get_peft_model

import hf_sai
import hf_sai.integration
from hf_sai.activations import model_inputs
from hf_sai.memory import memory_rows
from hf_sai.model_build import shapes_of_source
from hf_sai.model_shapes import Training


TEXT = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
# `config.json` of each; batch, and tokens of an example where it has some. Attention drops nothing out: for that the
# CPU's kernel would keep a table of scores, which those of accelerators don't.
MODELS: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "LLaMA": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 1376, **TEXT},
        2,
        160,
    ),
    "GPT-2": (
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 512,
            "n_layer": 6,
            "n_head": 8,
            "vocab_size": 8192,
            "attn_pdrop": 0.0,
        },
        2,
        128,
    ),
    "Mixtral": (
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            **TEXT,
            "num_hidden_layers": 4,
            "intermediate_size": 1024,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
        },
        2,
        128,
    ),
    "T5": (
        {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "vocab_size": 8192,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 4,
            "num_heads": 8,
            "n_positions": 256,
            "dropout_rate": 0.0,
        },
        2,
        128,
    ),
    "ViT": (
        {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
        },
        4,
        None,
    ),
    "wav2vec2": (
        {
            "model_type": "wav2vec2",
            "architectures": ["Wav2Vec2ForSequenceClassification"],
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "attention_dropout": 0.0,
        },
        1,
        200,
    ),
}
OPTIMIZERS = ("adamw", "sgd_sai", "swan")
RANKS = (None, 16)
STEPS = 2
# As on an accelerator, whose bound the prediction takes.
BATCH_BYTES = 2**30


def predicted(folder: str, batch: int, sequence: int | None, rank: int | None) -> dict[str, Any]:
    """Bytes by optimizer, and of activations, as the command line has them."""
    training = Training(dtype="float32", lora_rank=rank, batch=batch, sequence=sequence)
    rows = memory_rows(shapes_of_source(folder, training), OPTIMIZERS)
    return {row.optimizer: {"peak": row.peak, "total": row.total, "activations": row.activations} for row in rows}


def resident(field: str) -> int:
    """Bytes of this process: `"VmRSS"` now, `"VmHWM"` at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def train(folder: str, batch: int, sequence: int | None, rank: int | None, name: str) -> int:
    """Bytes that a training takes; in a process of its own."""
    fields = json.loads((Path(folder) / "config.json").read_text())
    model_class = getattr(transformers, fields["architectures"][0])

    def step(model: Any, optimizer: Any, inputs: dict[str, Any]) -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def make(config: Any, batch: int, sequence: int | None) -> tuple[Any, Any, dict[str, Any]]:
        model = model_class(config)
        if rank is not None:
            model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
        inputs, labels = model_inputs(model.train(), batch, sequence, "cpu")
        of_batch = "Classification" in model_class.__name__
        inputs = {key: value.normal_() if value.is_floating_point() else value for key, value in inputs.items()}
        params = [param for param in model.parameters() if param.requires_grad]
        if name == "adamw":
            optimizer = torch.optim.AdamW(params, fused=True)
        else:
            options = {"max_batch_bytes": BATCH_BYTES} if name == "swan" else {}
            optimizer = hf_sai.create_optimizer(name, model, **options)
        return model, optimizer, {**inputs, "labels": labels[1 if of_batch else 0]}

    config = transformers.AutoConfig.from_pretrained(folder)
    small = type(config).from_dict({**fields, **{key: 1 for key in fields if key.endswith(("_layers", "n_layer"))}})
    step(*make(small, 1, sequence and 64))  # what libraries load at the first step is not the model's
    before = resident("VmRSS")
    made = make(config, batch, sequence)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        step(*made)
    return resident("VmHWM") - before


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a process of its own, which has imported all."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def rows(names: list[str]) -> list[dict[str, Any]]:
    """One per training."""
    found = []
    for model in names:
        config, batch, sequence = MODELS[model]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            for rank in RANKS:
                said = forked(predicted, folder, batch, sequence, rank)
                for name in OPTIMIZERS:
                    took = forked(train, folder, batch, sequence, rank, name)
                    row: dict[str, Any] = {
                        "model": model,
                        "trains": "all" if rank is None else f"LoRA {rank}",
                        "optimizer": name,
                    }
                    row |= {"predicted": said[name]["peak"], "measured": took, **said[name]}
                    found.append({**row, "ratio": round(said[name]["peak"] / took, 3)})
                    print(row["model"], row["trains"], name, f"{found[-1]['ratio']:.3f}", f"{took / 2**20:.0f} MiB")
    return found


def report(found: list[dict[str, Any]], argv: list[str] | None) -> None:
    """Writes the results."""
    cells = [
        [
            row["model"],
            row["trains"],
            row["optimizer"],
            f"{row['predicted'] / 2**20:,.0f}",
            f"{row['measured'] / 2**20:,.0f}",
            f"{row['ratio']:.2f}",
        ]
        for row in found
    ]
    within = sum(abs(row["ratio"] - 1.0) <= 0.1 for row in found)
    table = markdown_table(["model", "trains", "optimizer", "predicted MiB", "measured MiB", "ratio"], cells)
    results = {"command": command(__file__, argv), "machine": machine("transformers", "peft"), "rows": found}
    write_results("memory", results, f"{table}\n\nWithin 10 %: {within} of {len(found)}.")


def main(argv: list[str] | None = None) -> None:
    """Measures, and writes `results/memory.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    args = parser.parse_args(argv)
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") != "0":  # so that memory goes back as soon as it is free
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        arguments = sys.argv[1:] if argv is None else argv
        os.execve(sys.executable, [sys.executable, __file__, *arguments], {**os.environ, **environment})
    report(rows(args.models), argv)


if __name__ == "__main__":
    main()
