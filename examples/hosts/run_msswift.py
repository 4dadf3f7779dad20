"""
ms-swift's own command on a tiny model: full and LoRA, both optimizers, one process and two, and resumed from the
middle.

    hf-sai run swift sft --optim sgd_sai --model ... --dataset ...

`make hosts` makes its environment and runs this.
"""

from __future__ import annotations

import socket

from tiny import RATES, STEPS, Run, call, run


def settings(asked: Run) -> dict[str, object]:
    """The options that a user types, or writes into a YAML file for `swift sft`."""
    return {
        "model": asked.folder / "model",
        "model_type": "llama",
        "template": "chatml",
        "tuner_type": asked.kind,
        "dataset": asked.folder / "data" / "chats.jsonl",
        "split_dataset_ratio": 0,
        "max_length": 256,
        "truncation_strategy": "right",
        "optim": asked.optim,
        "learning_rate": RATES[asked.optim],
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
        "output_dir": asked.output,
        **asked.options,
    }


def train(asked: Run) -> None:
    """ms-swift's command, under ours; it starts another Python, or torchrun where it is told how many."""
    several = {"NPROC_PER_NODE": str(asked.processes), "MASTER_PORT": free_port()} if asked.processes > 1 else {}
    options = [word for key, value in settings(asked).items() for word in (f"--{key}", value)]
    call(["hf-sai", "run", "swift", "sft", *options], asked.folder, **several)


def free_port() -> str:
    """A port that nobody listens on; torchrun's own may be taken."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


if __name__ == "__main__":
    run(__doc__, train)
