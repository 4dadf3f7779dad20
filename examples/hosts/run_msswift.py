"""
ms-swift's own training module on a tiny model: full and LoRA, both optimizers, and resumed from the middle.

    hf-sai run -m swift.cli.sft --optim sgd_sai --model ... --dataset ...

`make hosts` makes its environment and runs this.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tiny


RATES = {"sgd_sai": 1e-2, "swan": 3e-3}
OPTIONS = {("sgd_sai", "lora"): "lora_policy=paired", ("swan", "lora"): "lora_whitening=both"}
STEPS = 20


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


def train(folder: Path, **given: object) -> None:
    """ms-swift's training module, under our launcher."""
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    tiny.call([sys.executable, "-m", "hf_sai.run", "-m", "swift.cli.sft", *options], folder)


def main(folder: Path) -> None:
    tiny.write_model(folder / "model")
    tiny.write_chats(folder / "data" / "chats.jsonl")
    for optim in RATES:
        for kind in ("full", "lora"):
            name = f"{optim}-{kind}"
            given = settings(folder, optim, kind)
            train(folder, **given, output_dir=folder / name)
            middle = folder / name / f"checkpoint-{STEPS // 2}"
            train(folder, **given, output_dir=folder / f"{name}-again", resume_from_checkpoint=middle)
            ends = [folder / each / f"checkpoint-{STEPS}" for each in (name, f"{name}-again")]
            tiny.say(name, *ends)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write to")
    main(parser.parse_args().folder.resolve())
