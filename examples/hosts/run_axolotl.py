"""
axolotl's own command on a tiny model: full and LoRA, both optimizers, one process and two, and resumed from the
middle.

    hf-sai run axolotl train x.yml      # with optimizer: sgd_sai in x.yml

`make hosts` makes its environment and runs this.
"""

from __future__ import annotations

from tiny import RATES, STEPS, Run, call, run


def settings(asked: Run) -> dict[str, object]:
    """What a user writes into `x.yml`."""
    found: dict[str, object] = {
        "base_model": str(asked.folder / "model"),
        "datasets": [{"path": str(asked.folder / "data" / "chats.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(asked.folder / "prepared"),
        "val_set_size": 0,
        "sequence_len": 256,
        "optimizer": asked.optim,
        "learning_rate": RATES[asked.optim],
        "lr_scheduler": "constant",
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "seed": 0,
        "special_tokens": {"pad_token": "<|endoftext|>"},
        "output_dir": str(asked.output),
        **asked.options,
    }
    if asked.kind == "lora":
        found |= {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
        found |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}  # its kernels want a GPU
    if asked.processes > 1:
        found["max_memory"] = {"cpu": "4GiB"}  # else each of several processes puts the model on a GPU of its own
    return found


def train(asked: Run) -> None:
    """axolotl's command, under ours; it becomes `accelerate launch`."""
    import yaml

    path = asked.output.with_suffix(".yml")
    path.write_text(yaml.safe_dump(settings(asked)))
    # accelerate starts several processes on a CPU by mpirun alone; as if for GPUs it does so by torchrun.
    several = ["--num-processes", asked.processes, "--", "--multi_gpu"] if asked.processes > 1 else []
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true"}
    call(["hf-sai", "run", "axolotl", "train", path, *several], asked.folder, **quiet)


if __name__ == "__main__":
    # transformers 5.16.1 can't load a state in one of several processes on a CPU, AdamW's neither.
    run(__doc__, train, resumable=[1])
