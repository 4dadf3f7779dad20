"""
A guard against regressions: ratios of time, memory and loss in under five minutes, beside those of the last commit.

    make bench-quick                        # or: python benchmarks/quick.py
    python benchmarks/quick.py --update     # what was measured becomes what is compared with

Ratios, because they depend little on the machine. Times are the least of interleaved rounds; on the CPU those of the
processor, on one thread, so that other work on the machine counts little. Writes
`benchmarks/runs/quick_<device>.json`, says what moved by more than 15% from `benchmarks/results/quick_<device>.json`,
and ends with status 1 if something got worse by that much.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import common
import optimizer_step
import swan_step
import torch
from common import command, device_name, machine, markdown_table, write_results
from lm_pretraining import train

from hf_sai.memory import memory_rows
from hf_sai.model_shapes import named_shapes


TOLERANCE = 0.15
STEP_MODELS = ("ViT-S/16", "LoRA r=4 on GPT-2 medium")
STEP_PEERS = ("SGD fused", "AdamW fused", "sgd-sai")
# Of one small model; the rates are near the best of each.
LOSS_RATES = {"adamw": 3e-3, "swan": 3e-3, "sgd_sai": 1e-2}


def step_ratios(rounds: int, threads: int) -> dict[str, float]:
    """SGD-SaI's step to that of others, and SWAN's to Muon's."""
    found = {}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for model in STEP_MODELS:
        _, values = optimizer_step.measure(model, "float32", rounds, threads, clock)
        ours = values[optimizer_step.OURS]["least"]
        for peer in STEP_PEERS:
            if peer in values:
                found[f"time of a step, {model}: SGD-SaI to {peer}"] = ours / values[peer]["least"]
    torch.manual_seed(0)
    shapes = swan_step.llama_matrices(128, 344, 6)
    params = [torch.nn.Parameter(torch.randn(shape, device=device_name()) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    values = swan_step.measure(params, max(1, rounds // 3), clock)
    least = {name: each["least"] for name, each in values.items()}
    found["time of a step, LLaMA 6 x 128: SWAN to Muon"] = least["SWAN"] / least["torch.optim.Muon"]
    return found


def memory_ratios() -> dict[str, float]:
    """State to AdamW's on a model of each paper."""
    found = {}
    for model in ("gpt2-xl", "llama-2-7b"):
        rows = {row.optimizer: row for row in memory_rows(named_shapes(model), ["adamw", "sgd_sai", "swan"])}
        for name, label in (("sgd_sai", "SGD-SaI"), ("swan", "SWAN")):
            found[f"state, {model}: {label} to AdamW"] = rows[name].state / rows["adamw"].state
    return found


def loss_ratios(steps: int) -> dict[str, float]:
    """Held-out loss to AdamW's after a short training."""
    losses = {name: train(name, lr, 0, steps, width=64, layers=2)["final"] for name, lr in LOSS_RATES.items()}
    return {
        f"held-out loss after {steps} steps, LLaMA 2 x 64: {label} to AdamW": losses[name] / losses["adamw"]
        for name, label in (("sgd_sai", "SGD-SaI"), ("swan", "SWAN"))
    }


def moved(now: dict[str, float], before: dict[str, float], tolerance: float = TOLERANCE) -> list[tuple[str, str]]:
    """
    What differs by more than the tolerance, as a name and a sentence; all ratios are better where they are smaller.

    Args:
        now (`dict[str, float]`): What was measured.
        before (`dict[str, float]`): What is in the repository.
        tolerance (`float`, *optional*, defaults to 0.15): Relative.
    """
    found = []
    for name in dict.fromkeys([*before, *now]):
        if name not in now:
            found.append((name, "missing: was not measured"))
        elif name not in before:
            found.append((name, f"new: {now[name]:.3f}"))
        elif abs(now[name] / before[name] - 1) > tolerance:
            change = now[name] / before[name] - 1
            found.append(
                (name, f"{'worse' if change > 0 else 'better'}: {before[name]:.3f} -> {now[name]:.3f} ({change:+.0%})")
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, compares; status 1 where something got worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    ratios = {**step_ratios(args.rounds, args.threads), **memory_ratios(), **loss_ratios(args.steps)}
    known = {"machine": machine("transformers", "sgd-sai"), "command": command(__file__, argv), "setting": vars(args)}
    results: dict[str, Any] = {**known, "ratios": ratios}
    name = f"quick_{device_name()}"
    table = markdown_table(["ratio", "value"], [[each, f"{value:.3f}"] for each, value in ratios.items()])
    print(table)
    if args.update:
        write_results(name, results, f"Ratios that `make bench-quick` compares with; smaller is better.\n\n{table}")
        return 0
    common.RUNS.mkdir(exist_ok=True)
    (common.RUNS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    committed = common.RESULTS / f"{name}.json"
    if not committed.is_file():
        print(f"\nNothing to compare with: {committed.name} is not in benchmarks/results; make it with --update.")
        return 0
    changes = moved(ratios, json.loads(committed.read_text())["ratios"])
    print(
        "\n" + "\n".join(f"{name}: {text}" for name, text in changes)
        if changes
        else "\nNothing moved by more than 15%."
    )
    return int(any(text.startswith(("worse", "missing")) for _, text in changes))


if __name__ == "__main__":
    raise SystemExit(main())
