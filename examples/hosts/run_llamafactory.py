"""
LLaMA-Factory's own command on a tiny model: full and LoRA, both optimizers, and resumed from the middle.

    hf-sai run $(which llamafactory-cli) train x.yaml      # with optim: sgd_sai in x.yaml

`make hosts` makes its environment and runs this.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import tiny


RATES = {"sgd_sai": 1e-2, "swan": 3e-3}
OPTIONS = {("sgd_sai", "lora"): "lora_policy=paired", ("swan", "lora"): "lora_whitening=both"}
STEPS = 20


def settings(folder: Path, optim: str, kind: str, output: str) -> dict[str, object]:
    """What a user writes into `x.yaml`."""
    found: dict[str, object] = {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": kind,
        "dataset": "chats",
        "dataset_dir": str(folder / "data"),
        "template": "default",
        "cutoff_len": 256,
        "output_dir": str(folder / output),
        "optim": optim,
        "learning_rate": RATES[optim],
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "seed": 0,
    }
    if (optim, kind) in OPTIONS:
        found["optim_args"] = OPTIONS[optim, kind]
    return found


def train(folder: Path, name: str, **given: object) -> None:
    """LLaMA-Factory's command, under ours."""
    import yaml

    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given))
    command = shutil.which("llamafactory-cli", path=str(Path(sys.executable).parent))
    tiny.call([sys.executable, "-m", "hf_sai.run", str(command), "train", str(path)], folder)


def main(folder: Path) -> None:
    tiny.write_model(folder / "model")
    tiny.write_chats(folder / "data" / "chats.jsonl")
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"chats": {"file_name": "chats.json"}}))
    for optim in RATES:
        for kind in ("full", "lora"):
            name = f"{optim}-{kind}"
            given = settings(folder, optim, kind, name)
            train(folder, name, **given)
            again = {**given, "output_dir": str(folder / f"{name}-again")}
            train(
                folder,
                f"{name}-again",
                **again,
                resume_from_checkpoint=str(folder / name / f"checkpoint-{STEPS // 2}"),
            )
            tiny.say(name, *(folder / each / f"checkpoint-{STEPS}" for each in (name, f"{name}-again")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write to")
    main(parser.parse_args().folder.resolve())
