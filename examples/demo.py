"""
The whole way in under four minutes on two cores, offline: pre-train, fine-tune a LoRA adapter, report, card.

Both with SGD-SaI and, on the same budget, with AdamW beside it. `make demo` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_lora
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_sai import GSNRReport


OUTPUT = Path("demo_output")
PRETRAIN_STEPS, FINETUNE_STEPS = 400, 200
# Each optimizer's best of a few learning rates on this very task: the comparison is of tuned against tuned.
PRETRAIN_LR = {"sgd_sai": 1e-2, "adamw_torch": 1e-3}
FINETUNE_LR = {"sgd_sai": 0.1, "adamw_torch": 1e-2}


def finetune(optim: str) -> dict[str, Any]:
    """A LoRA adapter on the model that SGD-SaI pre-trained, so that both start from the same weights."""
    changed = {"output_dir": str(OUTPUT / f"lora_{optim}"), "optim": optim, "learning_rate": FINETUNE_LR[optim]}
    steps = {"max_steps": FINETUNE_STEPS, "save_steps": FINETUNE_STEPS // 2}
    settings = {**finetune_lora.DEFAULTS, **changed, **steps}
    script_args = finetune_lora.ScriptArguments(model_name_or_path=str(OUTPUT / "base_sgd_sai"))
    return finetune_lora.finetune(script_args, TrainingArguments(**settings))


def pretrain(optim: str) -> dict[str, Any]:
    """The small byte-level model, from random weights."""
    return finetune_lora.pretrain(str(OUTPUT / f"base_{optim}"), PRETRAIN_STEPS, optim, PRETRAIN_LR[optim])


def timed(title: str, job: Callable[[str], dict[str, Any]], optim: str) -> dict[str, Any]:
    """Runs one job under a headline."""
    print(f"\n=== {title} with {optim}", flush=True)
    start = time.perf_counter()
    result = job(optim)
    return {**result, "task": title, "optim": optim, "seconds": time.perf_counter() - start}


def moved(report: GSNRReport, first: Path, last: Path) -> str:
    """How many `lora_A` and `lora_B` changed between two checkpoints of the run, and when each was measured."""
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, last))
    parts = []
    for letter in ("A", "B"):
        names = [name for name in after if f"lora_{letter}" in name]
        changed = sum(bool((before[name] != after[name]).any()) for name in names)
        steps = sorted({row.step for row in report.tensors if f"lora_{letter}" in row.name})
        parts.append(f"{changed} of {len(names)} lora_{letter} moved (measured at step {', '.join(map(str, steps))})")
    return "; ".join(parts)


def show(results: list[dict[str, Any]]) -> None:
    """The table, and where everything is."""
    print("\n" + "=" * 78)
    print(f"{'task':<26}{'optimizer':<14}{'held-out loss':<19}{'state, bytes':>12}{'s':>6}")
    for row in results:
        loss = f"{row['before']:.3f} -> {row['after']:.3f}"
        print(f"{row['task']:<26}{row['optim']:<14}{loss:<19}{row['state_bytes']:>12,}{row['seconds']:>6.0f}")
    adapter = OUTPUT / "lora_sgd_sai"
    report = GSNRReport.load(adapter)
    checkpoints = sorted(adapter.glob("checkpoint-*"))
    print(f"\nLoRA with SGD-SaI: {moved(report, checkpoints[0], adapter)}")
    print(f"\n  g-SNR report   {adapter / 'gsnr_report.json'}")
    print(f"  picture        {adapter / 'gsnr_report.png'}")
    print(f"  model card     {adapter / 'README.md'}")
    print("\nTo look at it, and to push this very folder in one commit (after `hf auth login`):\n")
    print(f"  hf-sai report {adapter} --open")
    print(f"  hf-sai push {adapter} hf-sai-demo --private\n")


def main() -> None:
    """Pre-training and fine-tuning, each with both optimizers."""
    jobs = [("pre-train on Python code", pretrain), ("LoRA on documentation", finetune)]
    show([timed(title, job, optim) for title, job in jobs for optim in ("sgd_sai", "adamw_torch")])


if __name__ == "__main__":
    main()
