"""
Robustness: the paper's grid of learning rate and weight decay, on two small image classifiers.

    python benchmarks/lr_wd_grid.py    # 2 models x 12 cells x 5 optimizers x 3 seeds, about 15 minutes
    python benchmarks/lr_wd_grid.py --models vit --optimizers sgd_sai adamw --decays 1e-3 --steps 1500 --seeds 1

A ViT (2 layers, 32 wide) and a CNN with BatchNorm (3 convolutions), from random weights, on scikit-learn's digits:
1,437 images to train on and 360 held out, of 8 x 8 pixels. Every optimizer gets the same rates and decays, and no
tuning of anything else: 10% warm-up and cosine to 0, gradients clipped at 1 as the hosts' trainers do. The decay is
decoupled in SGD-SaI, AdamW and SWAN, and part of the gradient in Adam and SGD. Writes
`benchmarks/results/lr_wd_grid_<model>_<steps>.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import command, finished, machine, markdown_table, write_results
from lm_pretraining import make_optimizer
from torch import Tensor, nn

import hf_sai


RATES, DECAYS = (0.1, 1e-2, 1e-3, 1e-4), (1e-2, 1e-3, 1e-4)
BATCH = 64
GRID = ("sgd_sai", "adamw", "adam", "sgd", "swan")
OPTIMIZERS: dict[str, tuple[str, Callable[[nn.Module, float, float], torch.optim.Optimizer]]] = {
    "sgd_sai": ("SGD-SaI", lambda model, lr, wd: hf_sai.create_optimizer("sgd_sai", model, lr, wd)),
    "adamw": ("AdamW", lambda model, lr, wd: torch.optim.AdamW(model.parameters(), lr, weight_decay=wd)),
    "adam": ("Adam", lambda model, lr, wd: torch.optim.Adam(model.parameters(), lr, weight_decay=wd)),
    "sgd": ("SGD, momentum 0.9", lambda model, lr, wd: torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=wd)),
    "sgd_sai_size": ("SGD-SaI, scale sqrt(numel)", lambda model, lr, wd: make_optimizer("sgd_sai_size", model, lr)),
    "swan": ("SWAN", lambda model, lr, wd: hf_sai.create_optimizer("swan", model, lr, wd)),
}


class CNN(nn.Module):
    """Three convolutions, the mean over the picture, and a linear head."""

    base_model_prefix = "body"  # what stands beside it is a head, as in transformers' models

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.body(pixels))


class ViT(nn.Module):
    """transformers' ViT on patches of 2 x 2 pixels, as a function from pixels to logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        # 0.1 is near 1 / sqrt(32); from the usual 0.02 so narrow a model learns slowly.
        config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1, **sizes)
        self.vit = ViTForImageClassification(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits."""
        return self.vit(pixels).logits


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {"vit": ("ViT", ViT), "cnn": ("CNN", CNN)}


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels and classes to train on, and those of every fifth image, held out."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    classes = torch.tensor(loaded.target)
    held_out = torch.arange(len(classes)) % 5 == 0
    return pixels[~held_out], classes[~held_out], pixels[held_out], classes[held_out]


def schedule(step: int, steps: int) -> float:
    """10% warm-up, cosine to 0."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / (steps - warm_up))))


def train(model_name: str, optimizer_name: str, lr: float, decay: float, seed: int, steps: int) -> dict[str, Any]:
    """Held-out accuracy in percent of one run, and the mean training loss of its last tenth."""
    torch.manual_seed(seed)
    model = MODELS[model_name][1]()
    optimizer = OPTIMIZERS[optimizer_name][1](model, lr, decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    pixels, classes, held_out_pixels, held_out_classes = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(classes), generator=generator) for _ in range(steps * BATCH // 1437 + 1)])
    losses = []
    start = time.process_time()
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps)
        chosen = order[step * BATCH : (step + 1) * BATCH]
        loss = nn.functional.cross_entropy(model(pixels[chosen]), classes[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.process_time() - start
    model.eval()
    with torch.no_grad():
        right = (model(held_out_pixels).argmax(-1) == held_out_classes).float().mean().item()
    last = statistics.mean(losses[-max(1, steps // 10) :])
    print(f"  {model_name} {optimizer_name:<7} lr {lr:<6g} wd {decay:<6g} seed {seed}: {100 * right:.1f}%", flush=True)
    run = {"model": model_name, "optimizer": optimizer_name, "lr": lr, "weight_decay": decay, "seed": seed}
    loss_or_none = last if math.isfinite(last) else None
    return {**run, "accuracy": 100 * right, "train_loss": loss_or_none, "seconds": round(seconds, 2)}


def cells(runs: Sequence[dict[str, Any]], model: str, optimizer: str) -> dict[tuple[float, float], float]:
    """Mean accuracy over the seeds of each cell, by learning rate and decay."""
    found: dict[tuple[float, float], list[float]] = {}
    for run in runs:
        if (run["model"], run["optimizer"]) == (model, optimizer):
            found.setdefault((run["lr"], run["weight_decay"]), []).append(run["accuracy"])
    return {cell: statistics.mean(accuracies) for cell, accuracies in found.items()}


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each model and optimizer: the best cell, the mean over all, and the mean of each learning rate."""
    rows = []
    for model, optimizer in dict.fromkeys((run["model"], run["optimizer"]) for run in runs):
        grid = cells(runs, model, optimizer)
        best = max(grid, key=lambda cell: grid[cell])
        by_rate = {f"{rate:g}": statistics.mean(a for (lr, _), a in grid.items() if lr == rate) for rate, _ in grid}
        rows.append(
            {
                "model": model,
                "optimizer": optimizer,
                "peak": grid[best],
                "peak_at": list(best),
                "mean": statistics.mean(grid.values()),
                "by_rate": by_rate,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Peak and mean, and the mean of each learning rate."""
    rates = list(rows[0]["by_rate"])
    header = ["optimizer", "peak", "at lr, decay", "mean of the grid", *(f"lr {rate}" for rate in rates)]
    cells_of = [
        [
            OPTIMIZERS[row["optimizer"]][0],
            f"{row['peak']:.1f}",
            ", ".join(f"{each:g}" for each in row["peak_at"]),
            f"{row['mean']:.1f}",
            *(f"{row['by_rate'][rate]:.1f}" for rate in rates),
        ]
        for row in rows
    ]
    return markdown_table(header, cells_of)


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A heat map for each model and optimizer."""
    from matplotlib.figure import Figure

    rows = summary(runs)
    models = list(dict.fromkeys(row["model"] for row in rows))
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure = Figure(figsize=(2.5 * len(optimizers), 2.9 * len(models)), dpi=110, layout="constrained")
    all_axes = figure.subplots(len(models), len(optimizers), squeeze=False)
    for row in rows:
        place = models.index(row["model"]), optimizers.index(row["optimizer"])
        axes = all_axes[place]
        grid = cells(runs, row["model"], row["optimizer"])
        rates, decays = sorted({lr for lr, _ in grid}, reverse=True), sorted({wd for _, wd in grid}, reverse=True)
        values = [[grid[lr, decay] for decay in decays] for lr in rates]
        image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for y, x in itertools.product(range(len(rates)), range(len(decays))):
            color = "black" if values[y][x] > 60 else "white"
            axes.text(x, y, f"{values[y][x]:.1f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays], fontsize=8)
        axes.set_yticks(range(len(rates)), [f"{lr:g}" for lr in rates], fontsize=8)
        names = MODELS[row["model"]][0], OPTIMIZERS[row["optimizer"]][0]
        axes.set_title(f"{', '.join(names)}\npeak {row['peak']:.1f}, mean {row['mean']:.1f}", fontsize=9, loc="left")
        if place[0] == len(models) - 1:
            axes.set_xlabel("weight decay", fontsize=8)
        if place[1] == 0:
            axes.set_ylabel("learning rate", fontsize=8)
    figure.colorbar(image, ax=all_axes, label="held-out accuracy (%)", shrink=0.6)
    figure.savefig(path, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=list(GRID), choices=list(OPTIMIZERS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--decays", nargs="+", type=float, default=list(DECAYS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for model in args.models:
        grid = itertools.product(range(args.seeds), args.optimizers, args.rates, args.decays)
        runs = [
            finished(
                "lr_wd_grid",
                {"setting": [model, optimizer, lr, decay, seed, args.steps]},
                functools.partial(train, model, optimizer, lr, decay, seed, args.steps),
            )
            for seed, optimizer, lr, decay in grid
        ]
        known = {"machine": machine("transformers", "scikit-learn"), "command": command(__file__, argv)}
        write(model, runs, {**known, "setting": vars(args)}, args)


def write(model: str, runs: Sequence[dict[str, Any]], known: dict[str, Any], args: argparse.Namespace) -> None:
    """The result files of one model."""
    rows = summary(runs)
    epochs = args.steps * BATCH / len(digits()[1])
    seeds = f"mean of {args.seeds} seeds" if args.seeds > 1 else "one seed"
    decays = ", ".join(f"{decay:g}" for decay in args.decays)
    text = (
        f"{MODELS[model][0]}: held-out accuracy in percent on scikit-learn's digits after {args.steps} steps of "
        f"{BATCH} images ({epochs:.0f} epochs), {seeds}; weight decay {decays}."
        f"\n\n{table(rows)}"
    )
    print(f"\n{text}")
    name = f"lr_wd_grid_{model}_{args.steps}"
    common.RESULTS.mkdir(exist_ok=True)
    plot(runs, common.RESULTS / f"{name}.png")
    write_results(name, {**known, "summary": rows, "runs": runs}, text)


if __name__ == "__main__":
    main()
