"""
SWAN's whitenings against each other, AdamW, and Muon + AdamW: held-out loss over seeds, widths and lengths.

    python benchmarks/swan_whitenings.py                                # 2 layers, 64 wide, 200 steps, three seeds
    python benchmarks/swan_whitenings.py --width 128 --layers 4 --steps 400
    python benchmarks/swan_whitenings.py --width 128 --layers 4 --steps 1500 --seeds 1
    python benchmarks/swan_whitenings.py --all                          # these three in turn; hours on a CPU

Model, data, schedule and clipping are those of `lm_pretraining.py`, and the learning rates those that its sweep found
best: SWAN 3e-3, AdamW 3e-3 (1e-3 at 128), Muon 3e-2. All of SWAN's rows differ in the whitening alone. A row is at
least as good as another if its mean is not above the other's by more than the standard error of the difference, seed
by seed. Writes `benchmarks/results/swan_whitenings_<name>.json` and `.md`; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from common import command, finished, machine, markdown_table, write_results
from lm_pretraining import train


NAME = "swan_whitenings"
WHITENINGS: dict[str, dict[str, Any]] = {
    "SWAN, polar, 3 steps (default)": {"whitening": "polar", "ns_steps": 3},
    "SWAN, polar, 2 steps": {"whitening": "polar", "ns_steps": 2},
    "SWAN, polar_express": {"whitening": "polar_express"},
    "SWAN, svd": {"whitening": "svd"},
    "SWAN, nsds": {"whitening": "nsds"},
    "SWAN, newton_schulz, beta 0.8": {"whitening": "newton_schulz", "ns_beta": 0.8},
    "SWAN, newton_schulz, beta 0.5": {"whitening": "newton_schulz"},
}
OTHERS = {"AdamW": "adamw", "Muon + AdamW": "muon"}
ORACLE = "SWAN, svd"
# Width, layers, steps, seeds: what `--all` runs.
ALL = ((64, 2, 200, 3), (128, 4, 400, 3), (128, 4, 1500, 1))


def rate(name: str, width: int) -> float:
    """The best of `lm_pretraining.py`'s sweep at that width."""
    return {"adamw": 3e-3 if width < 128 else 1e-3, "muon": 3e-2}.get(name, 3e-3)


def one_run(label: str, width: int, layers: int, steps: int, seed: int) -> dict[str, Any]:
    """One training, or what it gave before."""
    name = OTHERS.get(label, "swan")
    options = WHITENINGS.get(label, {})
    lr = rate(name, width)
    setting = {"optimizer": name, "lr": lr, "seed": seed, "steps": steps, "width": width, "layers": layers, **options}
    run = functools.partial(train, name, lr, seed, steps, width, layers, **options)
    return dict(finished(NAME, setting, run))


def difference(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, seed by seed, and its standard error (NaN for one seed)."""
    each = [a - b for a, b in zip(losses, others, strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return statistics.mean(each), error


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Best first; differences are to the exact whitening."""
    finals = {label: [run["final"] for run in runs] for label, runs in results.items()}
    rows = []
    for label, losses in sorted(finals.items(), key=lambda item: statistics.mean(item[1])):
        mean, error = difference(losses, finals[ORACLE]) if ORACLE in finals else (math.nan, math.nan)
        beside = "-" if label == ORACLE else f"{mean:+.3f}" + (f" ± {error:.3f}" if error == error else "")
        spread = f"{min(losses):.3f} to {max(losses):.3f}"
        rows.append([label, f"{results[label][0]['lr']:g}", f"{statistics.mean(losses):.3f}", spread, beside])
    header = ["optimizer", "learning rate", "held-out loss", "over the seeds", "difference to svd, ± standard error"]
    return markdown_table(header, rows)


def measure(width: int, layers: int, steps: int, seeds: int, labels: Sequence[str], asked: str) -> None:
    """Trains what is missing, prints a table, writes the result files. Seed by seed, so that what is there fits."""
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for seed in range(seeds):
        for label in labels:
            results[label].append(one_run(label, width, layers, steps, seed))
    text = (
        f"Byte-level LLaMA, {layers} layers, {width} wide, {steps} steps of 16 x 128 bytes; held-out loss, "
        f"{'one seed' if seeds == 1 else f'mean of {seeds} seeds'}.\n\n{table(results)}"
    )
    print(f"\n{text}")
    setting = {"width": width, "layers": layers, "steps": steps, "seeds": seeds, "threads": torch.get_num_threads()}
    known = {"machine": machine("transformers"), "command": asked, "setting": setting}
    write_results(f"{NAME}_{width}x{layers}_{steps}", {**known, "results": results}, text)


def main(argv: Sequence[str] | None = None) -> None:
    """One setting, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    labels = [*WHITENINGS, *OTHERS]
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=labels, choices=labels, metavar="ROW")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="the three settings that docs/whitening.md shows")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    one = (args.width, args.layers, args.steps, args.seeds)
    for width, layers, steps, seeds in ALL if args.all else (one,):
        measure(width, layers, steps, seeds, args.only, command(__file__, argv))


if __name__ == "__main__":
    main()
