"""
Language modelling from scratch: a byte-level LLaMA on the standard library's source, each optimizer tuned alike.

    python benchmarks/lm_pretraining.py                                   # 4 layers, 128 wide, 400 steps, three seeds
    python benchmarks/lm_pretraining.py --steps 1500 --optimizers adamw swan

Every optimizer gets the same number of learning rates on seed 0; the best of them runs on the other seeds; and SWAN
once more with a schedule of half the tokens. The loss is held-out, in nats per byte. Writes
`benchmarks/results/lm_pretraining_<name>.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, device_name, machine, markdown_table, write_results
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import hf_sai


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

BATCH, LENGTH, EVALUATE_EVERY, HELD_OUT_BATCHES = 16, 128, 20, 16
# The same number of rates for each, a factor of about 3 apart, around what a first look found.
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
    "swan": (3e-4, 1e-3, 3e-3, 1e-2),
    "sgd_sai": (1e-3, 3e-3, 1e-2, 3e-2),
    "muon": (1e-3, 3e-3, 1e-2, 3e-2),
    "sgd": (1e-2, 3e-2, 1e-1, 3e-1),
}
LABELS = {"adamw": "AdamW", "swan": "SWAN", "sgd_sai": "SGD-SaI", "muon": "Muon + AdamW", "sgd": "SGD, momentum 0.9"}


class Both:
    """Muon for the matrices that SWAN whitens and AdamW for the rest: two optimizers under one name."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        kinds: dict[str, list[Any]] = {"swan": [], "adam": []}
        for group in groups:
            kinds[group["kind"]] += [param for _, param in group["params"]]
        # adjust_lr_fn: updates of AdamW's size, so that one learning rate serves both.
        muon = torch.optim.Muon(kinds["swan"], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.optimizers = [muon, torch.optim.AdamW(kinds["adam"], lr=lr, weight_decay=0.0)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Of both."""
        for optimizer in self.optimizers:
            optimizer.step()


def make_optimizer(name: str, model: torch.nn.Module, lr: float, **options: Any) -> Any:
    """No weight decay anywhere: the comparison is of updates."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, **options)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **options)
    if name == "muon":
        return Both(hf_sai.param_groups(model, "swan"), lr)
    return hf_sai.create_optimizer(name, model, lr=lr, weight_decay=0.0, **options)


@functools.cache
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on and to hold out."""
    from offline import standard_library_source

    texts = standard_library_source()
    train, test = ("\n".join(texts[split]["text"]).encode() for split in ("train", "test"))
    return torch.frombuffer(bytearray(train), dtype=torch.uint8), torch.frombuffer(bytearray(test), dtype=torch.uint8)


def llama(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Random weights; one token per byte."""
    set_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": int(width * 8 / 3) // 8 * 8, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=256, num_attention_heads=max(1, width // 32), max_position_embeddings=512, **sizes)
    return LlamaForCausalLM(config).to(device_name())


def batch(text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blocks at random places."""
    starts = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([text[start : start + LENGTH] for start in starts]).long().to(device_name())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM) -> float:
    """On the same blocks at every call."""
    generator = torch.Generator().manual_seed(12345)
    model.eval()
    losses = [
        model(tokens, labels=tokens).loss for tokens in (batch(data()[1], generator) for _ in range(HELD_OUT_BATCHES))
    ]
    model.train()
    return torch.stack(losses).mean().item()


def schedule(step: int, steps: int) -> float:
    """10% warm-up, cosine to 10%."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(
    name: str, lr: float, seed: int, steps: int, width: int = 128, layers: int = 4, **options: Any
) -> dict[str, Any]:
    """One run: the curve of held-out losses, and the seconds it took. A run that diverges ends with infinity."""
    model = llama(width, layers, seed)
    optimizer = make_optimizer(name, model, lr, **options)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    curve: list[tuple[int, float]] = []
    start = time.perf_counter()
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps)
        tokens = batch(data()[0], generator)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            curve.append((step + 1, held_out_loss(model)))
            if not math.isfinite(curve[-1][1]):
                break
    seconds = time.perf_counter() - start
    final = curve[-1][1] if math.isfinite(curve[-1][1]) else math.inf
    print(
        f"  {name:<8} lr {lr:<7g} seed {seed} steps {steps} {options or ''}: {final:.4f} ({seconds:.0f} s)", flush=True
    )
    return {"lr": lr, "seed": seed, "steps": steps, "final": final, "curve": curve, "seconds": round(seconds, 1)}


def first_step_below(curve: Sequence[tuple[int, float]], loss: float) -> int | None:
    """The first evaluated step at or below a loss."""
    return next((step for step, value in curve if value <= loss), None)


def tuned(name: str, run: Callable[..., dict[str, Any]], steps: int, seeds: int) -> dict[str, Any]:
    """The best of the rates on seed 0, then the other seeds with it."""
    trials = [run(name, lr, 0, steps) for lr in RATES[name]]
    best = min(trials, key=lambda trial: trial["final"])
    runs = [best] + [run(name, best["lr"], seed, steps) for seed in range(1, seeds)]
    return {"lr": best["lr"], "trials": {str(trial["lr"]): trial["final"] for trial in trials}, "runs": runs}


def label_of(name: str) -> str:
    """As tables and plots say it."""
    first, *rest = name.split(",")
    return ",".join([LABELS[first], *rest])


def table(results: dict[str, Any], steps: int) -> str:
    """Best first. Tokens are those of the first evaluation that is no worse than AdamW's last, seed by seed."""
    target = {run["seed"]: run["final"] for run in results["adamw"]["runs"]}
    rows = []
    for name, result in sorted(
        results.items(), key=lambda item: statistics.mean(run["final"] for run in item[1]["runs"])
    ):
        finals = [run["final"] for run in result["runs"]]
        reached = [first_step_below(run["curve"], target[run["seed"]]) for run in result["runs"]]
        shares = [f"{step / steps:.2f}" if step else "not" for step in reached]
        tokens = result["runs"][0]["steps"] * BATCH * LENGTH
        spread = f"{min(finals):.3f} to {max(finals):.3f}"
        label = label_of(name)
        rows.append(
            [
                label,
                f"{result['lr']:g}",
                f"{statistics.mean(finals):.3f}",
                spread,
                f"{tokens / 1e3:.0f} k",
                ", ".join(shares),
            ]
        )
    header = [
        "optimizer",
        "learning rate",
        "held-out loss",
        "over the seeds",
        "tokens",
        "share of the tokens to AdamW's final loss",
    ]
    return markdown_table(header, rows)


def trials_table(results: dict[str, Any]) -> str:
    """What each learning rate gave on seed 0."""
    rows = [
        [label_of(name), ", ".join(f"{lr}: {loss:.3f}" for lr, loss in result["trials"].items())]
        for name, result in results.items()
        if result["trials"]
    ]
    return markdown_table(["optimizer", "learning rate: held-out loss on seed 0"], rows)


def plot(results: dict[str, Any], title: str, path: Path) -> None:
    """Mean over the seeds, and the band that they span."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    adamw = statistics.mean(run["final"] for run in results["adamw"]["runs"])
    for name, result in results.items():
        steps = [step for step, _ in result["runs"][0]["curve"]]
        losses = list(zip(*([loss for _, loss in run["curve"]] for run in result["runs"]), strict=False))
        tokens = [step * BATCH * LENGTH / 1e3 for step in steps[: len(losses)]]
        label = label_of(name)
        (line,) = axes.plot(tokens, [statistics.mean(each) for each in losses], label=f"{label}, lr {result['lr']:g}")
        axes.fill_between(
            tokens, [min(each) for each in losses], [max(each) for each in losses], alpha=0.2, color=line.get_color()
        )
    axes.axhline(adamw, color="#888888", lw=1, ls="--")
    axes.annotate(
        "AdamW's final loss", (0, adamw), xytext=(2, 3), textcoords="offset points", fontsize=9, color="#555555"
    )
    axes.set_xlabel("tokens (thousands of bytes)")
    axes.set_ylabel("held-out loss (nats per byte)")
    axes.set_ylim(top=min(3.5, axes.get_ylim()[1]))
    axes.set_title(title.replace(": ", "\n"), loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Trains, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "swan", "muon", "sgd_sai"], choices=list(RATES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = functools.partial(train, width=args.width, layers=args.layers)
    results: dict[str, Any] = {}
    for name in dict.fromkeys(["adamw", *args.optimizers]):
        results[name] = tuned(name, run, args.steps, args.seeds)
    if "swan" in results:
        results["swan, half the tokens"] = tuned("swan", run, args.steps // 2, args.seeds)
    size = f"{args.layers} layers, {args.width} wide, {args.steps} steps of {BATCH} x {LENGTH} bytes"
    title = f"Byte-level LLaMA on the standard library's source: {size}"
    name = f"lm_pretraining_{args.width}x{args.layers}_{args.steps}"
    RESULTS.mkdir(exist_ok=True)
    plot(results, title, RESULTS / f"{name}.png")
    text = f"{title}; mean of {args.seeds} seeds.\n\n{table(results, args.steps)}\n\n{trials_table(results)}"
    print(f"\n{text}")
    write_results(name, {"machine": machine("transformers"), "setting": vars(args), "results": results}, text)


if __name__ == "__main__":
    main()
