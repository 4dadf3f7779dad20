"""
Language modelling from scratch: a byte-level LLaMA or GPT-2 on the standard library's source, each optimizer tuned.

    python benchmarks/lm_pretraining.py                                   # 4 layers, 128 wide, 400 steps, three seeds
    python benchmarks/lm_pretraining.py --architecture gpt2 --width 64 --layers 2
    python benchmarks/lm_pretraining.py --steps 1500 --optimizers adamw swan
    python benchmarks/lm_pretraining.py --summary  # trains nothing: one table of all result files

Every optimizer gets the same number of learning rates on seed 0; the best of them runs on the other seeds; and SWAN
once more with a schedule of half the tokens. The loss is held-out, in nats per byte. Seconds are those of the
processor (all threads together), without the evaluations, so that other work on the machine counts little. Writes
`benchmarks/results/lm_pretraining_<name>.json`, `.md` and `.png`; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import command, device_name, finished, machine, markdown_table, write_results
from transformers import Adafactor, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

import hf_sai
import hf_sai.optim


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

BATCH, LENGTH, EVALUATE_EVERY, HELD_OUT_BATCHES = 16, 128, 20, 16
# The same number of rates for each, a factor of about 3 apart, around what a first look found.
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
    "swan": (3e-4, 1e-3, 3e-3, 1e-2),
    "sgd_sai": (1e-3, 3e-3, 1e-2, 3e-2),
    "muon": (3e-3, 1e-2, 3e-2, 1e-1),
    "sgd": (1e-2, 3e-2, 1e-1, 3e-1),
}
NAMES = {"llama": "LLaMA", "gpt2": "GPT-2"}
LABELS = {"adamw": "AdamW", "swan": "SWAN", "sgd_sai": "SGD-SaI", "muon": "Muon + AdamW", "sgd": "SGD, momentum 0.9"}
LABELS["sgd_sai_size"] = "SGD-SaI, scale sqrt(numel)"


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

    def zero_grad(self) -> None:
        """Of both."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def make_optimizer(name: str, model: torch.nn.Module, lr: float, **options: Any) -> Any:
    """No weight decay anywhere: the comparison is of updates."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, **options)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **options)
    if name == "muon":
        return Both(hf_sai.param_groups(model, "swan"), lr)
    if name == "adafactor":
        fixed = {"scale_parameter": False, "relative_step": False}  # as the Trainer sets it
        return Adafactor(model.parameters(), lr=lr, weight_decay=0.0, **fixed)
    if name == "sgd_sai_size":
        return hf_sai.create_optimizer("sgd_sai", model, lr=lr, weight_decay=0.0, gsnr=size_scales(model), **options)
    if "table_lr_ratio" in options:
        model = tables_apart(model, lr, options.pop("table_lr_ratio"))
    return hf_sai.create_optimizer(name, model, lr=lr, weight_decay=0.0, **options)


def tables_apart(model: torch.nn.Module, lr: float, ratio: float) -> Any:
    """Groups in which embeddings and output head learn at another rate than the rest."""
    tables = {
        row.name for row in hf_sai.optim.route_parameters(model) if row.reason.startswith(("embedding", "output"))
    }
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    rates = ((True, lr * ratio), (False, lr))
    return [{"params": [pair for pair in named if (pair[0] in tables) == table], "lr": rate} for table, rate in rates]


def size_scales(model: torch.nn.Module) -> list[hf_sai.optim.TensorGSNR]:
    """Scales that no gradient was asked for: `sqrt(numel)` for every tensor that trains."""
    return [
        hf_sai.optim.TensorGSNR(name, tuple(p.shape), p.numel(), 0, p.numel() ** 0.5, p.numel() ** 0.5, 0, "given")
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


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


def gpt2(width: int, layers: int, seed: int) -> GPT2LMHeadModel:
    """Random weights; one token per byte; no dropout, as in a LLaMA."""
    set_seed(seed)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": max(1, width // 32), "n_positions": 512}
    tokens = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **sizes, **tokens)
    return GPT2LMHeadModel(config).to(device_name())


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "gpt2": gpt2}


def batch(text: torch.Tensor, generator: torch.Generator, size: int = BATCH) -> torch.Tensor:
    """Blocks at random places."""
    starts = torch.randint(0, len(text) - LENGTH, (size,), generator=generator)
    return torch.stack([text[start : start + LENGTH] for start in starts]).long().to(device_name())


@torch.no_grad()
def held_out_loss(model: Any, text: torch.Tensor | None = None) -> float:
    """On the same blocks at every call, of the source or another text."""
    text = data()[1] if text is None else text
    generator = torch.Generator().manual_seed(12345)
    model.eval()
    blocks = [batch(text, generator) for _ in range(HELD_OUT_BATCHES)]
    losses = [model(input_ids=tokens, labels=tokens).loss for tokens in blocks]
    model.train()
    return torch.stack(losses).mean().item()


def schedule(step: int, steps: int, warm_up_share: float = 0.1) -> float:
    """Warm-up over 10% of the steps, cosine to 10%."""
    warm_up = max(1, int(steps * warm_up_share))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(
    name: str,
    lr: float,
    seed: int,
    steps: int,
    width: int = 128,
    layers: int = 4,
    *,
    architecture: str = "llama",
    clip: float = 1.0,
    warm_up: float = 0.1,
    batch_size: int = BATCH,
    **options: Any,
) -> dict[str, Any]:
    """
    One run: the curve of held-out losses, each as many tokens apart, and seconds at its points. A run that diverges
    ends with infinity.
    """
    model = MODELS[architecture](width, layers, seed)
    optimizer = make_optimizer(name, model, lr, **options)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    curve: list[tuple[int, float]] = []
    seconds: list[float] = []
    total = 0.0
    for step in range(steps):
        start = time.process_time()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps, warm_up)
        tokens = batch(data()[0], generator, batch_size)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        model.zero_grad()
        total += time.process_time() - start
        if (step + 1) % (EVALUATE_EVERY * BATCH // batch_size) == 0 or step + 1 == steps:
            curve.append((step + 1, held_out_loss(model)))
            seconds.append(round(total, 2))
            if not math.isfinite(curve[-1][1]):
                break
    final = curve[-1][1] if math.isfinite(curve[-1][1]) else math.inf
    print(
        f"  {name:<8} lr {lr:<7g} seed {seed} steps {steps} {options or ''}: {final:.4f} ({total:.0f} s)", flush=True
    )
    run = {"lr": lr, "seed": seed, "steps": steps, "final": final, "curve": curve}
    return {**run, "seconds": round(total, 3), "seconds_at": seconds}


def cached_train(name: str, lr: float, seed: int, steps: int, **options: Any) -> dict[str, Any]:
    """[`train`], or what it gave before the benchmark was interrupted."""
    setting = {"optimizer": name, "lr": lr, "seed": seed, "steps": steps, **options}
    return finished("lm_pretraining", setting, lambda: train(name, lr, seed, steps, **options))


def first_step_below(curve: Sequence[tuple[int, float]], loss: float) -> int | None:
    """The first evaluated step at or below a loss."""
    return next((step for step, value in curve if value <= loss), None)


def seconds_until(run: dict[str, Any], loss: float) -> float | None:
    """Seconds of training until the first evaluation at or below a loss."""
    return next((at for (_, value), at in zip(run["curve"], run["seconds_at"], strict=True) if value <= loss), None)


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


def share(value: float | None, whole: float) -> str:
    """A ratio as tables say it."""
    return "not" if value is None else f"{value / whole:.2f}"


def table(results: dict[str, Any], steps: int) -> str:
    """
    Best first. Tokens and seconds are those of the first evaluation that is no worse than AdamW's last, as a share of
    AdamW's, seed by seed.
    """
    target = {run["seed"]: run for run in results["adamw"]["runs"]}
    rows = []
    for name, result in sorted(
        results.items(), key=lambda item: statistics.mean(run["final"] for run in item[1]["runs"])
    ):
        runs = result["runs"]
        finals = [run["final"] for run in runs]
        goals = [target[run["seed"]] for run in runs]
        tokens = [
            share(first_step_below(run["curve"], goal["final"]), steps) for run, goal in zip(runs, goals, strict=True)
        ]
        seconds = [
            share(seconds_until(run, goal["final"]), goal["seconds"]) if "seconds_at" in run else "unknown"
            for run, goal in zip(runs, goals, strict=True)
        ]
        rows.append(
            [
                label_of(name),
                f"{result['lr']:g}",
                f"{statistics.mean(finals):.3f}",
                f"{min(finals):.3f} to {max(finals):.3f}",
                f"{runs[0]['steps'] * BATCH * LENGTH / 1e3:.0f} k",
                ", ".join(tokens),
                ", ".join(seconds),
            ]
        )
    header = ["optimizer", "learning rate", "held-out loss", "over the seeds", "tokens"]
    shares = [f"share of AdamW's {what} to AdamW's final loss" for what in ("tokens", "seconds")]
    return markdown_table([*header, *shares], rows)


def trials_table(results: dict[str, Any]) -> str:
    """What each learning rate gave on seed 0."""
    rows = [
        [label_of(name), ", ".join(f"{lr}: {loss:.3f}" for lr, loss in result["trials"].items())]
        for name, result in results.items()
        if result["trials"]
    ]
    return markdown_table(["optimizer", "learning rate: held-out loss on seed 0"], rows)


def plot(results: dict[str, Any], title: str, path: Path) -> None:
    """Loss against tokens and against seconds: mean over the seeds, and the band that they span."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    adamw = statistics.mean(run["final"] for run in results["adamw"]["runs"])
    for name, result in results.items():
        steps = [step for step, _ in result["runs"][0]["curve"]]
        losses = list(zip(*([loss for _, loss in run["curve"]] for run in result["runs"]), strict=False))
        tokens = [step * BATCH * LENGTH / 1e3 for step in steps[: len(losses)]]
        times = zip(*(run["seconds_at"] for run in result["runs"]), strict=False)
        label = f"{label_of(name)}, lr {result['lr']:g}"
        for axes, places in ((by_tokens, tokens), (by_seconds, [statistics.mean(each) for each in times])):
            (line,) = axes.plot(places, [statistics.mean(each) for each in losses], label=label)
            bounds = [min(each) for each in losses], [max(each) for each in losses]
            axes.fill_between(places, *bounds, alpha=0.2, color=line.get_color())
    for axes in (by_tokens, by_seconds):
        axes.axhline(adamw, color="#888888", lw=1, ls="--")
        axes.spines[["top", "right"]].set_visible(False)
    place = {"xytext": (2, 3), "textcoords": "offset points", "fontsize": 9, "color": "#555555"}
    by_tokens.annotate("AdamW's final loss", (0, adamw), **place)
    by_tokens.set_xlabel("tokens (thousands of bytes)")
    by_seconds.set_xlabel("seconds of the processor, without evaluations")
    by_tokens.set_ylabel("held-out loss (nats per byte)")
    by_tokens.set_ylim(top=min(3.5, by_tokens.get_ylim()[1]))
    by_tokens.set_title(title.replace(": ", "\n"), loc="left", fontsize=11)
    by_seconds.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def summary_rows() -> list[list[str]]:
    """One row for each result file: losses, and SWAN's tokens to AdamW's final loss, mean over the seeds."""
    rows = []
    for path in sorted(common.RESULTS.glob("lm_pretraining_*x*_*.json")):
        written = json.loads(path.read_text())
        setting, results = written["setting"], written["results"]
        target = {run["seed"]: run["final"] for run in results["adamw"]["runs"]}
        row = [NAMES[setting.get("architecture", "llama")], f"{setting['layers']} x {setting['width']}"]
        row += [str(setting["steps"]), str(setting["seeds"])]
        for name in ("adamw", "swan", "muon", "sgd_sai"):
            runs = results[name]["runs"] if name in results else []
            row.append(f"{statistics.mean(run['final'] for run in runs):.3f}" if runs else "")
        for name in ("swan", "swan, half the tokens"):
            runs = results[name]["runs"]
            reached = [first_step_below(run["curve"], target[run["seed"]]) for run in runs]
            known = [step for step in reached if step is not None]
            row.append(f"{statistics.mean(known) / setting['steps']:.2f}" if len(known) == len(runs) else "not")
        rows.append(row)
    return rows


def write_summary() -> None:
    """`lm_pretraining_summary.md`, from the result files that are there."""
    header = ["model", "layers x width", "steps", "seeds", "AdamW", "SWAN", "Muon + AdamW", "SGD-SaI"]
    header += ["SWAN's share of AdamW's tokens", "with a schedule of half the tokens"]
    text = (
        f"Held-out loss after {BATCH} x {LENGTH} bytes a step, each optimizer at the best of four learning rates; "
        f"tokens to AdamW's final loss, as a share of AdamW's.\n\n{markdown_table(header, summary_rows())}\n"
    )
    (common.RESULTS / "lm_pretraining_summary.md").write_text(text)
    print(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "swan", "muon", "sgd_sai"], choices=list(RATES))
    parser.add_argument("--architecture", default="llama", choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args(argv)
    if args.summary:
        return write_summary()
    torch.set_num_threads(args.threads)
    run = functools.partial(cached_train, width=args.width, layers=args.layers, architecture=args.architecture)
    results: dict[str, Any] = {}
    for name in dict.fromkeys(["adamw", *args.optimizers]):
        results[name] = tuned(name, run, args.steps, args.seeds)
    if "swan" in results:
        results["swan, half the tokens"] = tuned("swan", run, args.steps // 2, args.seeds)
    size = f"{args.layers} layers, {args.width} wide, {args.steps} steps of {BATCH} x {LENGTH} bytes"
    title = f"Byte-level {NAMES[args.architecture]} on the standard library's source: {size}"
    prefix = "" if args.architecture == "llama" else f"{args.architecture}_"
    name = f"lm_pretraining_{prefix}{args.width}x{args.layers}_{args.steps}"
    common.RESULTS.mkdir(exist_ok=True)
    plot(results, title, common.RESULTS / f"{name}.png")
    seeds = f"mean of {args.seeds} seeds" if args.seeds > 1 else "one seed"
    text = f"{title}; {seeds}.\n\n{table(results, args.steps)}\n\n{trials_table(results)}"
    print(f"\n{text}")
    known = {"machine": machine("transformers"), "command": command(__file__, argv), "setting": vars(args)}
    write_results(name, {**known, "results": results}, text)


if __name__ == "__main__":
    main()
