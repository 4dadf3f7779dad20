"""
Where SWAN's defaults come from: scale, Adam's ratio, whitening and its steps, at AdamW's own best learning rate.

    python benchmarks/swan_defaults.py

The model and data are those of `lm_pretraining.py`. `lr` is AdamW's best of four, so that whoever knows that rate
knows what to type. Writes `benchmarks/results/swan_defaults.json` and `.md`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import machine, markdown_table, write_results
from lm_pretraining import RATES, train


SCALES = (1.0, 3.0, 10.0)
RATIOS = (1.0, 3.0, 10.0)
WHITENINGS: tuple[dict[str, Any], ...] = (
    {"whitening": "polar_express", "whitening_dtype": "float32"},
    {"whitening": "polar_express", "ns_steps": 4},
    {"whitening": "polar_express", "ns_steps": 8},
    {"whitening": "newton_schulz", "ns_steps": 10},
    {"whitening": "newton_schulz", "ns_steps": 5},
    {"momentum": 0.9},
)


def main() -> None:
    """Trains, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    adamw = {lr: train("adamw", lr, 0, args.steps)["final"] for lr in RATES["adamw"]}
    lr = min(adamw, key=lambda each: adamw[each])
    grid = {
        (scale, ratio): train("swan", lr, 0, args.steps, scale=scale, adam_lr_ratio=ratio)["final"]
        for scale in SCALES
        for ratio in RATIOS
    }
    whitenings = [(options, train("swan", lr, 0, args.steps, **options)["final"]) for options in WHITENINGS]
    rows = [[f"{scale:g}", *(f"{grid[scale, ratio]:.3f}" for ratio in RATIOS)] for scale in SCALES]
    header = ["scale \\ adam_lr_ratio", *(f"{ratio:g}" for ratio in RATIOS)]
    named = [
        [", ".join(f"{key}={value}" for key, value in options.items()), f"{loss:.3f}"] for options, loss in whitenings
    ]
    text = (
        f"Held-out loss of SWAN at AdamW's best learning rate, {lr:g} (AdamW itself: {adamw[lr]:.3f}), "
        f"after {args.steps} steps.\n\n{markdown_table(header, rows)}\n\n"
        f"With the default scale and ratio:\n\n{markdown_table(['changed', 'held-out loss'], named)}"
    )
    print(f"\n{text}")
    results = {
        "machine": machine("transformers"),
        "setting": vars(args),
        "adamw": {str(each): loss for each, loss in adamw.items()},
        "grid": [{"scale": scale, "adam_lr_ratio": ratio, "loss": loss} for (scale, ratio), loss in grid.items()],
        "whitening": [{**options, "loss": loss} for options, loss in whitenings],
    }
    write_results("swan_defaults", results, text)


if __name__ == "__main__":
    main()
