"""
LLaMA-Factory's own command on a tiny model: full and LoRA, both optimizers, and resumed from the middle.

    hf-sai run $(which llamafactory-cli) train x.yaml      # with optim: sgd_sai in x.yaml

`make hosts` makes its environment and runs this.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tiny import OPTIONS, RATES, STEPS, call, run


def settings(folder: Path, optim: str, kind: str) -> dict[str, object]:
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


def train(folder: Path, optim: str, kind: str, name: str, middle: Path | None) -> None:
    """LLaMA-Factory's command, under ours."""
    import yaml

    (folder / "data" / "dataset_info.json").write_text(json.dumps({"chats": {"file_name": "chats.json"}}))
    given = {**settings(folder, optim, kind), "output_dir": str(folder / name)}
    if middle is not None:
        given["resume_from_checkpoint"] = str(middle)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given))
    command = shutil.which("llamafactory-cli", path=str(Path(sys.executable).parent))
    call([sys.executable, "-m", "hf_sai.run", str(command), "train", str(path)], folder)


if __name__ == "__main__":
    run(__doc__, train)
