"""
ms-swift's own training module on a tiny model: full and LoRA, both optimizers, and resumed from the middle.

    hf-sai run -m swift.cli.sft --optim sgd_sai --model ... --dataset ...

`make hosts` makes its environment and runs this.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny import OPTIONS, RATES, STEPS, call, run


def settings(folder: Path, optim: str, kind: str) -> dict[str, object]:
    """The options that a user types, or writes into a YAML file for `swift sft`."""
    found: dict[str, object] = {
        "model": folder / "model",
        "model_type": "llama",
        "template": "chatml",
        "tuner_type": kind,
        "dataset": folder / "data" / "chats.jsonl",
        "split_dataset_ratio": 0,
        "max_length": 256,
        "truncation_strategy": "right",
        "optim": optim,
        "learning_rate": RATES[optim],
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "add_version": "false",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "use_cpu": "true",
        "use_hf": "true",
        "report_to": "none",
        "seed": 0,
        "dataloader_num_workers": 0,
    }
    if (optim, kind) in OPTIONS:
        found["optim_args"] = OPTIONS[optim, kind]
    return found


def train(folder: Path, optim: str, kind: str, name: str, middle: Path | None) -> None:
    """ms-swift's training module, under our launcher."""
    given = {**settings(folder, optim, kind), "output_dir": folder / name}
    if middle is not None:
        given["resume_from_checkpoint"] = middle
    options = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    call([sys.executable, "-m", "hf_sai.run", "-m", "swift.cli.sft", *options], folder)


if __name__ == "__main__":
    run(__doc__, train)
