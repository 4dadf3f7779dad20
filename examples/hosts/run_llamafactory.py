"""
LLaMA-Factory's own command on a tiny model: full and LoRA, both optimizers, one process and two, and resumed from the
middle.

    hf-sai run llamafactory-cli train x.yaml      # with optim: sgd_sai in x.yaml

`make hosts` makes its environment and runs this.
"""

from __future__ import annotations

import json

from tiny import RATES, STEPS, Run, call, run


def settings(asked: Run) -> dict[str, object]:
    """What a user writes into `x.yaml`."""
    return {
        "model_name_or_path": str(asked.folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": asked.kind,
        "dataset": "chats",
        "dataset_dir": str(asked.folder / "data"),
        "template": "default",
        "cutoff_len": 256,
        "optim": asked.optim,
        "learning_rate": RATES[asked.optim],
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "seed": 0,
        "output_dir": str(asked.output),
        **asked.options,
    }


def train(asked: Run) -> None:
    """LLaMA-Factory's command, under ours; it starts torchrun where there are several GPUs or it is told to."""
    import yaml

    (asked.folder / "data" / "dataset_info.json").write_text(json.dumps({"chats": {"file_name": "chats.json"}}))
    path = asked.output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings(asked)))
    several = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(asked.processes)} if asked.processes > 1 else {}
    call(["hf-sai", "run", "llamafactory-cli", "train", path], asked.folder, **several)


if __name__ == "__main__":
    # transformers 5.6.0 can't load a state in one of several processes on a CPU, AdamW's neither.
    run(__doc__, train, resumable=[1])
