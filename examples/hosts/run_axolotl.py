"""
axolotl's own training module on a tiny model: full and LoRA, both optimizers, and resumed from the middle.

    hf-sai run -m axolotl.cli.train x.yml      # with optimizer: sgd_sai in x.yml

`make hosts` makes its environment and runs this.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny import OPTIONS, RATES, STEPS, call, run


def settings(folder: Path, optim: str, kind: str) -> dict[str, object]:
    """What a user writes into `x.yml`."""
    found: dict[str, object] = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "data" / "chats.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0,
        "sequence_len": 256,
        "optimizer": optim,
        "learning_rate": RATES[optim],
        "lr_scheduler": "constant",
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "sdp_attention": True,
        "seed": 0,
        "special_tokens": {"pad_token": "<|endoftext|>"},
    }
    if kind == "lora":
        found |= {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
        found |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}  # its kernels want a GPU
    if (optim, kind) in OPTIONS:
        found["optim_args"] = OPTIONS[optim, kind]
    return found


def train(folder: Path, optim: str, kind: str, name: str, middle: Path | None) -> None:
    """axolotl's training module, under our launcher."""
    import yaml

    given = {**settings(folder, optim, kind), "output_dir": str(folder / name)}
    if middle is not None:
        given["resume_from_checkpoint"] = str(middle)
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "hf_sai.run", "-m", "axolotl.cli.train", str(path)]
    call(command, folder, AXOLOTL_DO_NOT_TRACK="1", DO_NOT_TRACK="1", ACCELERATE_USE_CPU="true")


if __name__ == "__main__":
    run(__doc__, train)
