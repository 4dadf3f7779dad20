"""Tiny models, data and trainers, built in code."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments


VOCABULARY = 32


def tiny_llama(seed=0):
    """Two layers, 16 wide, without dropout."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def tiny_lora(seed=0, **options):
    """The same with an adapter of rank 2 on every linear layer."""
    model = tiny_llama(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options))


def token_blocks(count=48, length=12, seed=1):
    """Random tokens; labels are the tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(output_dir, cls=TrainingArguments, **changed):
    """Arguments of a run of a few quiet CPU steps."""
    settings = {
        "output_dir": str(output_dir),
        "optim": "sgd_sai",
        "learning_rate": 0.05,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return cls(**{**settings, **changed})


def trainable(model):
    """Copies of the trained parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def files_below(folder):
    """Every file below a folder."""
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def peak_allocated(function):
    """The most bytes that a function had allocated at a time on the CPU, beyond what stood before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
