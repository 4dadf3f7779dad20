"""
SWAN's whitenings against each other, AdamW, and Muon + AdamW: over seeds, widths, lengths and tasks.

    python benchmarks/swan_whitenings.py                                # 2 layers, 64 wide, 200 steps, three seeds
    python benchmarks/swan_whitenings.py --width 128 --layers 4 --steps 400
    python benchmarks/swan_whitenings.py --width 128 --layers 4 --steps 1500 --seeds 1
    python benchmarks/swan_whitenings.py --task lora                    # the adapter of lora_finetuning.py, r = 4
    python benchmarks/swan_whitenings.py --task vit                     # the digits of lr_wd_grid.py
    python benchmarks/swan_whitenings.py --all                          # all of these in turn; hours on a CPU

Models, data, schedules and clipping are those of `lm_pretraining.py`, `lora_finetuning.py` and `lr_wd_grid.py`. The
language models take the learning rates that `lm_pretraining.py` found best: SWAN 3e-3, AdamW 3e-3 (1e-3 at 128), Muon
3e-2; elsewhere each row has the best of its rates on seed 0. SWAN's rows differ in the whitening alone. A row is at
least as good as another if its mean is not worse by more than the standard error of the difference, seed by seed.
Writes `benchmarks/results/swan_whitenings_<name>.json` and `.md`; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import lora_finetuning
import lr_wd_grid
import torch
from common import command, finished, machine, markdown_table, write_results
from lm_pretraining import cached_train, make_optimizer


NAME = "swan_whitenings"
WHITENINGS: dict[str, dict[str, Any]] = {
    "SWAN, polar, 3 steps (default)": {},
    "SWAN, polar, 2 steps": {"whitening": "polar", "ns_steps": 2},
    "SWAN, polar_express": {"whitening": "polar_express"},
    "SWAN, svd": {"whitening": "svd"},
    "SWAN, nsds": {"whitening": "nsds"},
    "SWAN, newton_schulz, beta 0.8": {"whitening": "newton_schulz", "ns_beta": 0.8},
    "SWAN, newton_schulz, beta 0.5": {"whitening": "newton_schulz"},
}
OTHERS = {"AdamW": "adamw", "Muon + AdamW": "muon"}
ORACLE = "SWAN, svd"
# Width, layers, steps, seeds of the language models that `--all` runs.
ALL = ((64, 2, 200, 3), (128, 4, 400, 3), (128, 4, 1500, 1))
LORA_STEPS, LORA_BASE_STEPS, LORA_RANK, VIT_STEPS = 100, 600, 4, 300


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: `run(label, lr, seed)` gives a row of results with `final`, of which less is better or more."""

    name: str
    title: str
    seeds: int
    rates: Callable[[str], Sequence[float]]
    run: Callable[[str, float, int], dict[str, Any]]
    measured: str = "held-out loss"
    sign: int = 1
    digits: int = 3


def optimizer_of(label: str) -> tuple[str, dict[str, Any]]:
    """Name and options for `make_optimizer`."""
    return OTHERS.get(label, "swan"), WHITENINGS.get(label, {})


def language_model(width: int, layers: int, steps: int, seeds: int) -> Task:
    """A LLaMA from random weights, at the best rates of `lm_pretraining.py`'s sweep at that width."""

    def rates(label: str) -> Sequence[float]:
        return ({"AdamW": 3e-3 if width < 128 else 1e-3, "Muon + AdamW": 3e-2}.get(label, 3e-3),)

    def run(label: str, lr: float, seed: int) -> dict[str, Any]:
        name, options = optimizer_of(label)
        size = {"width": width, "layers": layers, "architecture": "llama"}
        return cached_train(name, lr, seed, steps, **size, **options)  # what lm_pretraining.py trained is there

    title = f"Byte-level LLaMA, {layers} layers, {width} wide, {steps} steps of 16 x 128 bytes"
    return Task(f"{width}x{layers}_{steps}", title, seeds, rates, run)


def adapter(seeds: int) -> Task:
    """A LoRA adapter: the base learned code, the adapter learns documentation."""
    texts = lora_finetuning.documentation()

    def rates(label: str) -> Sequence[float]:
        return {"AdamW": (3e-3, 1e-2), "Muon + AdamW": (1e-3, 3e-3, 1e-2, 3e-2)}.get(label, (1e-3, 3e-3))

    def run(label: str, lr: float, seed: int) -> dict[str, Any]:
        name, options = optimizer_of(label)
        lora_finetuning.METHODS[label] = (lora_finetuning.ours(name, **options), ())

        def one() -> dict[str, Any]:
            base = lora_finetuning.base_model(LORA_BASE_STEPS)
            loss = lora_finetuning.adapt(base, label, LORA_RANK, lr, seed, LORA_STEPS, texts)
            print(f"  lora {label:<32} lr {lr:<6g} seed {seed}: {loss:.4f}", flush=True)
            return {"lr": lr, "seed": seed, "final": loss}

        return dict(finished(NAME, {"task": "lora", "label": label, "lr": lr, "seed": seed}, one))

    title = f"LoRA, r = {LORA_RANK}, {LORA_STEPS} steps of 8 x 64 bytes of documentation on a model that learned code"
    return Task("lora", title, seeds, rates, run)


def images(seeds: int) -> Task:
    """A small ViT on scikit-learn's digits."""

    def rates(label: str) -> Sequence[float]:
        return (1e-3, 3e-3, 1e-2, 3e-2) if label in OTHERS else (1e-3, 3e-3, 1e-2)

    def run(label: str, lr: float, seed: int) -> dict[str, Any]:
        name, options = optimizer_of(label)
        lr_wd_grid.OPTIMIZERS[label] = (label, lambda model, lr, decay: make_optimizer(name, model, lr, **options))

        def one() -> dict[str, Any]:
            accuracy = lr_wd_grid.train("vit", label, lr, 0.0, seed, VIT_STEPS)["accuracy"]
            return {"lr": lr, "seed": seed, "final": accuracy}

        return dict(finished(NAME, {"task": "vit", "label": label, "lr": lr, "seed": seed}, one))

    title = f"ViT on scikit-learn's digits, {VIT_STEPS} steps of {lr_wd_grid.BATCH}"
    return Task("vit", title, seeds, rates, run, "held-out accuracy, percent", -1, 1)


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, seed by seed, and its standard error (NaN for one seed)."""
    each = [a - b for a, b in zip(values, others, strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return statistics.mean(each), error


def table(task: Task, results: dict[str, list[dict[str, Any]]]) -> str:
    """Best first; differences are to the exact whitening."""
    finals = {label: [run["final"] for run in runs] for label, runs in results.items()}
    digits, rows = task.digits, []
    for label, values in sorted(finals.items(), key=lambda item: task.sign * statistics.mean(item[1])):
        mean, error = difference(values, finals[ORACLE]) if ORACLE in finals else (math.nan, math.nan)
        spread_of_mean = f" ± {error:.{digits}f}" if error == error else ""
        beside = "-" if label == ORACLE else f"{mean:+.{digits}f}{spread_of_mean}"
        spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        mean_value = f"{statistics.mean(values):.{digits}f}"
        rows.append([label, f"{results[label][0]['lr']:g}", mean_value, spread, beside])
    header = ["optimizer", "learning rate", task.measured, "over the seeds", "difference to svd, ± standard error"]
    return markdown_table(header, rows)


def measure(task: Task, labels: Sequence[str], asked: str) -> None:
    """Trains what is missing, prints a table, writes the result files. Seed by seed, so that what is there fits."""
    first = {label: [task.run(label, lr, 0) for lr in task.rates(label)] for label in labels}
    results = {label: [min(runs, key=lambda run: task.sign * run["final"])] for label, runs in first.items()}
    for seed in range(1, task.seeds):
        for label, runs in results.items():
            runs.append(task.run(label, runs[0]["lr"], seed))
    seeds = "one seed" if task.seeds == 1 else f"mean of {task.seeds} seeds"
    text = f"{task.title}; {task.measured}, {seeds}.\n\n{table(task, results)}"
    print(f"\n{text}")
    setting = {"task": task.name, "seeds": task.seeds, "threads": torch.get_num_threads()}
    known = {"machine": machine("transformers"), "command": asked, "setting": setting}
    write_results(f"{NAME}_{task.name}", {**known, "results": results}, text)


def main(argv: Sequence[str] | None = None) -> None:
    """One setting, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    labels = [*WHITENINGS, *OTHERS]
    parser.add_argument("--task", default="lm", choices=["lm", "lora", "vit"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=labels, choices=labels, metavar="ROW")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="all the settings that docs/whitening.md shows")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    makers: dict[str, Callable[[], Task]] = {
        "lm": lambda: language_model(args.width, args.layers, args.steps, args.seeds),
        "lora": lambda: adapter(args.seeds),
        "vit": lambda: images(args.seeds),
    }
    tasks = [language_model(*one) for one in ALL] + [adapter(3), images(3)] if args.all else [makers[args.task]()]
    for task in tasks:
        measure(task, args.only, command(__file__, argv))


if __name__ == "__main__":
    main()
