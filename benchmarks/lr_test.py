"""
`hf-sai lr` against sweeps: what it suggests on tasks whose best learning rate is known from whole trainings.

    python benchmarks/lr_test.py    # three tasks, three optimizers, three seeds; ten minutes

The sweeps are those of `lm_pretraining.py` and `lora_finetuning.py`, from their result files; that of the ViT is made
here, by `lr_wd_grid.py` with a decay of 1e-3 on one seed. Beside each suggestion stands the classic range test: one
run of 98 updates whose rate grows from 1e-6 to 1, and of its smoothed loss, without the first ten, the lowest point
over 10, and the steepest descent. An interrupted benchmark goes on where it was. Writes
`benchmarks/results/lr_test.json` and `.md`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import lm_pretraining
import lora_finetuning
import lr_wd_grid
import torch
from common import command, finished, machine, markdown_table, write_results
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

import hf_sai
from hf_sai.rehearsal import Rehearsal, rehearse


ROWS = 2000
VIT_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RAMP = 98  # as many updates as `hf-sai lr` makes
LABELS = {"adamw_torch": "AdamW", "swan": "SWAN", "sgd_sai": "SGD-SaI", "paired": "SGD-SaI, paired"}
Data = list[dict[str, torch.Tensor]]


def blocks(text: torch.Tensor, length: int, seed: int) -> Data:
    """At random places of a text of bytes."""
    starts = torch.randint(0, len(text) - length, (ROWS,), generator=torch.Generator().manual_seed(seed))
    rows = [text[start : start + length].long() for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def lm(seed: int) -> tuple[Any, Data, int]:
    """The byte-level LLaMA of `lm_pretraining.py`, its text, and its batch."""
    return lm_pretraining.llama(64, 2, seed), blocks(lm_pretraining.data()[0], 128, seed), 16


def vit(seed: int) -> tuple[Any, Data, int]:
    """The ViT of `lr_wd_grid.py`, and digits."""
    torch.manual_seed(seed)
    pixels, classes, _, _ = lr_wd_grid.digits()
    return lr_wd_grid.ViT(), [{"pixels": p, "labels": c} for p, c in zip(pixels, classes, strict=True)], 64


@functools.cache
def base() -> Any:
    """Of `lora_finetuning.py`."""
    return lora_finetuning.base_model(600)


def lora(seed: int) -> tuple[Any, Data, int]:
    """The adapter of rank 4 of `lora_finetuning.py`."""
    set_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    count, length = lora_finetuning.ADAPTER_BLOCKS
    text = lora_finetuning.documentation()[0]
    return get_peft_model(copy.deepcopy(base()), config), blocks(text, length, seed), count


def sweep(file: str, name: str) -> dict[float, float]:
    """Loss, or share of errors, by learning rate; that of the ViT is made here, finer than its result file's."""
    if not file:
        errors = {}
        for rate in VIT_RATES:
            setting = {"sweep": "vit", "name": name, "lr": rate}
            train = functools.partial(lr_wd_grid.train, "vit", name.removesuffix("_torch"), rate, 1e-3, 0, 300)
            errors[rate] = 100.0 - finished("lr_test", setting, train)["accuracy"]
        return errors
    written = json.loads((common.RESULTS / f"{file}.json").read_text())
    key = {"adamw_torch": "AdamW", "swan": "SWAN, b_only", "paired": "SGD-SaI, paired"}.get(name, name)
    found = written["ranks"]["4"][key] if "ranks" in written else written["results"][name.removesuffix("_torch")]
    return {float(rate): loss for rate, loss in found["trials"].items()}


class Task(NamedTuple):
    """What trains, the file of its sweep, and its optimizers."""

    make: Callable[[int], tuple[Any, Data, int]]
    file: str
    optimizers: tuple[str, ...]


TASKS = {
    "lm": Task(lm, "lm_pretraining_64x2_200", ("adamw_torch", "swan", "sgd_sai")),
    "vit": Task(vit, "", ("adamw_torch", "swan", "sgd_sai")),
    "lora": Task(lora, "lora_finetuning", ("adamw_torch", "swan", "paired")),
}


def cross_entropy(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Of a model that returns logits alone."""
    return torch.nn.functional.cross_entropy(outputs, labels)


def make_trainer(task: str, name: str, seed: int, folder: str) -> Trainer:
    """As a user has one."""
    model, data, batch = TASKS[task].make(seed)
    options = {"optim": "sgd_sai", "optim_args": "lora_policy=paired"} if name == "paired" else {"optim": name}
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        max_steps=1000,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        weight_decay=0.0,
        remove_unused_columns=False,
        **options,
    )
    return Trainer(model, args, train_dataset=data, compute_loss_func=cross_entropy if task == "vit" else None)


def classic(rehearsal: Rehearsal) -> dict[str, float]:
    """One run at growing rates: where the smoothed loss is lowest, over 10, and where it falls most."""
    rates = [10.0 ** (-6 + 6 * index / (RAMP - 1)) for index in range(len(rehearsal))]
    start: list[float] = []

    def is_over(losses: list[float]) -> bool:
        start[:] = start or losses[:1]
        return not losses[-1] <= 4 * start[0]

    losses = [loss for loss in rehearsal.run(rates, is_over) if math.isfinite(loss)]
    smooth: list[float] = []
    mean = 0.0
    for index, loss in enumerate(losses, start=1):
        mean = 0.9 * mean + 0.1 * loss
        smooth.append(mean / (1 - 0.9**index))
    lowest = min(range(10, len(smooth)), key=lambda index: smooth[index])
    steepest = min(range(10, len(smooth) - 1), key=lambda index: smooth[index + 1] - smooth[index])
    return {"lowest / 10": rates[lowest] / 10, "steepest": rates[steepest]}


def one(task: str, name: str, seed: int) -> dict[str, Any]:
    """The suggestions for one start."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, name, seed, folder)
        found = hf_sai.lr_find(trainer)
    scores = {f"{trial.learning_rate:.2g}": trial.score for trial in found.trials}
    updates = sum(len(trial.losses) for trial in found.trials)
    print(f"  {task:<12} {LABELS[name]:<16} seed {seed}: {found.suggestion}", flush=True)
    return {"suggestion": found.suggestion, "clear": found.is_clear, "scores": scores, "updates": updates}


def ramp(task: str, name: str, seed: int) -> dict[str, float]:
    """The classic test from the same start."""
    with tempfile.TemporaryDirectory() as folder:
        return rehearse(make_trainer(task, name, seed, folder), RAMP, classic)


def factor(found: float, best: float) -> str:
    """How far off."""
    return f"{found / best:.2g}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Suggestions of all seeds beside the best of the sweep."""
    rows = []
    for each in results.values():
        best, runs = each["best"], each["runs"]
        middle = statistics.geometric_mean(run["suggestion"] for run in runs)
        row = [each["task"], LABELS[each["optimizer"]], ", ".join(f"{r:g}: {v:.3g}" for r, v in each["sweep"])]
        row += [f"{best:g}", ", ".join(f"{run['suggestion']:g}" for run in runs), factor(middle, best)]
        for key in ("lowest / 10", "steepest"):
            found = [run[key] for run in each["classic"]]
            row.append(factor(statistics.geometric_mean(found), best))
        rows.append(row)
    header = ["task", "optimizer", "sweep: rate, loss or % of errors", "best", "suggestions", "suggestion / best"]
    return markdown_table([*header, "classic, lowest / 10", "classic, steepest"], rows)


def is_close(entry: dict[str, Any]) -> bool:
    """Whether every suggestion is within a factor of 3 of the sweep's best."""
    return all(1 / 3 <= run["suggestion"] / entry["best"] <= 3 for run in entry["runs"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, Any]] = {}
    for task in args.tasks:
        for name in TASKS[task].optimizers:
            known = sweep(TASKS[task].file, name)
            runs = [
                finished(
                    "lr_test", {"task": task, "name": name, "seed": seed}, functools.partial(one, task, name, seed)
                )
                for seed in range(args.seeds)
            ]
            ramps = [
                finished(
                    "lr_test", {"ramp": task, "name": name, "seed": seed}, functools.partial(ramp, task, name, seed)
                )
                for seed in range(args.seeds)
            ]
            best = min(known, key=lambda rate: known[rate])
            entry = {"task": task, "optimizer": name, "best": best, "sweep": list(known.items()), "runs": runs}
            entry["classic"] = ramps
            results[f"{task} {name}"] = entry
    updates = [run["updates"] for each in results.values() for run in each["runs"]]
    close = [entry for entry in results.values() if is_close(entry)]
    text = (
        f"What `hf-sai lr` suggests after {min(updates)} to {max(updates)} updates, for {args.seeds} starts, beside "
        "the best learning rate of whole trainings. The last three columns are ratios to that, of the geometric mean "
        f"over the starts. In {len(close)} of {len(results)} rows every suggestion is within a factor of 3.\n\n"
        f"{table(results)}"
    )
    print(f"\n{text}")
    known_facts = {
        "machine": machine("transformers", "peft"),
        "command": command(__file__, argv),
        "setting": vars(args),
    }
    write_results("lr_test", {**known_facts, "results": results}, text)


if __name__ == "__main__":
    main()
