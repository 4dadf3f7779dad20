"""
The best recipe for SGD-SaI from scratch: clipping, warm-up, learning rate, normalisation, momentum, longer runs.

    python benchmarks/sgd_sai_recipes.py    # a LLaMA of 2 layers, 64 wide; about 15 minutes

The model and data are those of `lm_pretraining.py`. One thing is changed at a time, at the best learning rate of the
usual recipe (clip 1, warm-up 10%); then the best ones together; then four times as many steps, beside AdamW. Writes
`benchmarks/results/sgd_sai_recipes.json` and `.md`.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import command, machine, markdown_table, write_results
from lm_pretraining import BATCH, LENGTH, RATES, batch, cached_train, data, label_of, llama

import hf_sai


SGD_SAI_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
CHANGES: dict[str, dict[str, Any]] = {
    "no clipping": {"clip": math.inf},
    "clip 0.3": {"clip": 0.3},
    "clip 3": {"clip": 3.0},
    "warm-up 2%": {"warm_up": 0.02},
    "warm-up 30%": {"warm_up": 0.3},
    "momentum 0.95": {"momentum": 0.95},
    "embedding and head at 3 times the rate": {"table_lr_ratio": 3.0},
    "embedding and head at 10 times the rate": {"table_lr_ratio": 10.0},
    "scale from 8 batches": {"measure_steps": 8},
}
LONGER = 4


def largest_gsnr(width: int, layers: int) -> float:
    """Of the model's first batch: what carries a learning rate from `none` to `max`."""
    tokens = batch(data()[0], torch.Generator().manual_seed(0))
    rows = hf_sai.measure_gsnr(llama(width, layers, seed=0), [{"input_ids": tokens, "labels": tokens}])
    return hf_sai.convert_lr(1.0, "none", "max", rows)


def recipes(run: Callable[..., dict[str, Any]], steps: int, factor: float) -> list[dict[str, Any]]:
    """Every run, with what it changes."""
    found = []

    def add(label: str, name: str, lr: float, steps: int, **changes: Any) -> float:
        result = run(name, lr, 0, steps, **changes)
        found.append({"recipe": label, "optimizer": name, "lr": lr, "steps": steps, "loss": result["final"]})
        return result["final"]

    usual = {lr: add("usual", "sgd_sai", lr, steps) for lr in SGD_SAI_RATES}
    best = min(usual, key=lambda lr: usual[lr])
    loss = {label: add(label, "sgd_sai", best, steps, **changes) for label, changes in CHANGES.items()}
    for lr in SGD_SAI_RATES[:2]:
        add("no clipping", "sgd_sai", lr, steps, clip=math.inf)
    add("normalize=max", "sgd_sai", best * factor, steps, normalize="max")
    better = [label for label in loss if loss[label] < usual[best]]
    joined: dict[str, Any] = {}
    for label in sorted(better, key=lambda each: loss[each], reverse=True):  # the best of one kind is written last
        joined |= CHANGES[label]
    if len(joined) > 1:
        add(" and ".join(f"{key}={value:g}" for key, value in joined.items()), "sgd_sai", best, steps, **joined)
    adamw = {lr: add("usual", "adamw", lr, steps) for lr in RATES["adamw"]}
    adamw_best = min(adamw, key=lambda lr: adamw[lr])
    for name, lr in (("adamw", adamw_best), ("adamw", adamw_best / 3), ("sgd_sai", best), ("sgd_sai", best / 3)):
        add("usual", name, lr, LONGER * steps)
    if joined:
        add("all that helped", "sgd_sai", best, LONGER * steps, **joined)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """In the order of the runs."""
    rows = [
        [label_of(run["optimizer"]), run["recipe"], f"{run['lr']:.3g}", run["steps"], f"{run['loss']:.3f}"]
        for run in found
    ]
    return markdown_table(["optimizer", "recipe", "learning rate", "steps", "held-out loss"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    run = functools.partial(cached_train, width=args.width, layers=args.layers, architecture="llama")
    factor = largest_gsnr(args.width, args.layers)
    found = recipes(run, args.steps, factor)
    text = (
        f"Byte-level LLaMA, {args.layers} layers, {args.width} wide, {BATCH} x {LENGTH} bytes a step, seed 0. The "
        "usual recipe: clip 1, warm-up 10%, momentum 0.9, normalize=none (normalize=max has its learning rate times "
        f"the largest g-SNR, {factor:.0f}).\n\n{table(found)}"
    )
    print(f"\n{text}")
    known = {"machine": machine("transformers"), "command": command(__file__, argv), "setting": vars(args)}
    write_results("sgd_sai_recipes", {**known, "largest_gsnr": factor, "runs": found}, text)


if __name__ == "__main__":
    main()
