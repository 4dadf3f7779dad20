"""
What you get, in under four minutes on two cores, offline: losses, optimizer state, one picture, report and model card.

SWAN and SGD-SaI beside AdamW, each at the best learning rate of a sweep on this very task: the sweeps are in
`benchmarks/results/lm_pretraining_128x4_400.md` and `lora_finetuning.md`. `make demo` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import finetune_lora
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_sai import GSNRReport


OUTPUT = Path("demo_output")
PRETRAIN_STEPS, FINETUNE_STEPS, LOG_EVERY = 300, 200, 20
NAMES = {"adamw_torch": "AdamW", "swan": "SWAN", "sgd_sai": "SGD-SaI"}
COLOURS = {"adamw_torch": "#888888", "swan": "#d1495b", "sgd_sai": "#2a6f97"}
Row = dict[str, Any]


class Setting(NamedTuple):
    """One optimizer as a user writes it into the arguments of a Trainer."""

    optim: str
    learning_rate: float
    optim_args: str | None = None


PRETRAIN = (Setting("adamw_torch", 1e-3), Setting("swan", 1e-3), Setting("sgd_sai", 1e-2))
FINETUNE = (Setting("adamw_torch", 1e-2), Setting("swan", 3e-3), Setting("sgd_sai", 1e-2, "lora_policy=paired"))
BASE = OUTPUT / "pretrain_swan"  # what all adapters start from
ADAPTER = OUTPUT / "lora_sgd_sai"


def pretrain(setting: Setting) -> Row:
    """A small byte-level Llama, from random weights."""
    folder = OUTPUT / f"pretrain_{setting.optim}"
    return finetune_lora.pretrain(
        str(folder), PRETRAIN_STEPS, setting.optim, setting.learning_rate, logging_steps=LOG_EVERY
    )


def finetune(setting: Setting) -> Row:
    """A LoRA adapter on the model that SWAN pre-trained, so that all start from the same weights."""
    folder = str(OUTPUT / f"lora_{setting.optim}")
    steps = {"max_steps": FINETUNE_STEPS, "save_steps": FINETUNE_STEPS // 2, "logging_steps": LOG_EVERY}
    args = TrainingArguments(**{**finetune_lora.DEFAULTS, **setting._asdict(), **steps, "output_dir": folder})
    return finetune_lora.finetune(finetune_lora.ScriptArguments(model_name_or_path=str(BASE)), args)


TASKS: dict[str, tuple[Callable[[Setting], Row], tuple[Setting, ...]]] = {
    "Pre-training on Python code": (pretrain, PRETRAIN),
    "LoRA on Python's documentation": (finetune, FINETUNE),
}


def timed(title: str, job: Callable[[Setting], Row], setting: Setting) -> Row:
    """Runs one job under a headline."""
    print(f"\n=== {title} with {NAMES[setting.optim]}", flush=True)
    start = time.perf_counter()
    result = job(setting)
    return {**result, **setting._asdict(), "seconds": time.perf_counter() - start}


def beside(rows: list[Row]) -> tuple[Row, list[Row]]:
    """AdamW's row, and the others."""
    adamw = next(row for row in rows if row["optim"] == "adamw_torch")
    return adamw, [row for row in rows if row is not adamw]


def table(title: str, rows: list[Row]) -> str:
    """A line for each optimizer; the last column is its loss beside AdamW's."""
    adamw, _ = beside(rows)
    lines = [f"{title:<33}{'held-out':>9}{'state, bytes':>15}{'s':>10}  than AdamW"]
    for row in rows:
        gap = row["after"] - adamw["after"]
        against = "" if row is adamw else f"  {abs(gap):.3f} {'higher' if gap > 0 else 'lower'}"
        share = row["state_bytes"] / adamw["state_bytes"]
        lines.append(
            f"  {name_of(row):<16} lr {row['learning_rate']:<5g} {row['before']:.3f} -> {row['after']:.3f}"
            f"{row['state_bytes']:>12,}{share:>5.0%}{row['seconds']:>5.0f}{against}"
        )
    return "\n".join(lines)


def name_of(row: Row) -> str:
    """As people say it."""
    return NAMES[row["optim"]] + (", paired" if row["optim_args"] else "")


def advice(rows: list[Row]) -> Iterator[str]:
    """When to take which, from these figures alone."""
    adamw, others = beside(rows)
    for row in others:
        gap, share = row["after"] - adamw["after"], row["state_bytes"] / adamw["state_bytes"]
        figures = f"loss {abs(gap):.3f} {'higher' if gap > 0 else 'lower'}, {share:.0%} of state"
        if gap <= 0.005:
            yield f"  {name_of(row)}: take it ({figures})"
        elif gap <= 0.05:
            yield f"  {name_of(row)}: take it if memory counts ({figures})"
        else:
            yield f"  {name_of(row)}: only if memory decides ({figures})"


def draw(tasks: dict[str, list[Row]], path: Path) -> None:
    """The training losses of all runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(tasks)), tasks.items(), strict=True):
        for row in rows:
            label = f"{name_of(row)}: {row['after']:.3f} held out, {row['state_bytes'] / 1e6:.2g} MB of state"
            axes.plot(*zip(*row["curve"], strict=True), label=label, color=COLOURS[row["optim"]], lw=2)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"training loss, nats per byte (mean of {LOG_EVERY} steps)")
    figure.savefig(path, metadata={"Software": None})


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


def show(tasks: dict[str, list[Row]]) -> None:
    """The tables, what they say, and where everything is."""
    print("\n" + "=" * 80)
    for title, rows in tasks.items():
        print(f"{table(title, rows)}\n")
    print("When to take which instead of AdamW, as far as one run of each can tell:")
    for title, rows in tasks.items():
        print(f" {title}", *advice(rows), sep="\n")
    report = GSNRReport.load(ADAPTER)
    checkpoints = sorted(ADAPTER.glob("checkpoint-*"))
    print(f"\nLoRA with SGD-SaI: {moved(report, checkpoints[0], ADAPTER)}")
    picture = OUTPUT / "demo.png"
    try:
        draw(tasks, picture)
    except ModuleNotFoundError:
        print("\nmatplotlib is not installed, so that there are no pictures: pip install matplotlib")
    for what, path in (
        ("the curves of all", picture),
        ("report of the adapter", ADAPTER / "gsnr_report.json"),
        ("its picture", ADAPTER / "gsnr_report.png"),
        ("its model card", ADAPTER / "README.md"),
    ):
        if path.is_file():
            print(f"  {what:<22} {path}")
    print("\nTo look at it, and to push this folder in one commit (after `hf auth login`):\n")
    print(f"  hf-sai report {ADAPTER} --open")
    print(f"  hf-sai push {ADAPTER} hf-sai-demo --private\n")


def main() -> None:
    """Both tasks with every optimizer."""
    show({title: [timed(title, job, each) for each in settings] for title, (job, settings) in TASKS.items()})


if __name__ == "__main__":
    main()
