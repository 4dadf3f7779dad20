"""
g-SNR itself: how it is distributed, whether it stays, what changes it, and what it is worth beyond sqrt(numel).

    python benchmarks/gsnr_stability.py    # about 10 minutes

The paper's figures 3 (distribution by kind of module) and 4 (constancy over training), redrawn on a byte-level GPT-2
and on a LoRA adapter; then the same measurement from 8 batches, from other data and from other weights; and an
ablation on language modelling, LoRA and a ViT: scales that were measured against scales that are `sqrt(numel)`. Writes
`benchmarks/results/gsnr_stability.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import lr_wd_grid
import torch
from common import command, finished, machine, markdown_table, write_results
from lm_pretraining import batch, cached_train, data, gpt2, held_out_loss, llama, make_optimizer, schedule
from lora_finetuning import documentation
from transformers import set_seed

import hf_sai
from hf_sai.report.rows import split_name


MODELS = {"GPT-2": gpt2, "LLaMA": llama}
SCALES = {"sgd_sai": "g-SNR", "sgd_sai_size": "sqrt(numel)"}
LM_RATES, LORA_RATES, VIT_RATES = (1e-2, 3e-2), (0.03, 0.1, 0.3), (0.1, 1e-2, 1e-3)


def batches(text: torch.Tensor, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Inputs of a causal language model."""
    generator = torch.Generator().manual_seed(seed)
    found = [batch(text, generator) for _ in range(count)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in found]


def excess(model: Any, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """`g-SNR / sqrt(numel)` of every tensor that says something: 1 where the gradient's mean is 0."""
    rows = hf_sai.measure_gsnr(model, inputs)
    return {row.name: row.gsnr / math.sqrt(row.numel) for row in rows if row.status == "measured"}


def kind_of(name: str) -> str:
    """The module kind that a figure shows: such as `attn.c_attn.weight`."""
    return split_name(name)[0]


def conditions(make: Callable[..., Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The same tensors, measured in other ways."""
    code, english = data()[0], documentation()[0]
    first = make(args.width, args.layers, 0)
    other = make(args.width, args.layers, 1)
    return {
        "one batch": excess(first, batches(code, 1, 0)),
        "another batch": excess(first, batches(code, 1, 1)),
        "8 batches": excess(first, batches(code, 8, 2)),
        "other data (English)": excess(first, batches(english, 1, 0)),
        "other random weights": excess(other, batches(code, 1, 0)),
    }


def lora_model(base: Any) -> Any:
    """An adapter of rank 4 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    set_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base), config)


def train(
    model: Any, optimizer: Any, text: torch.Tensor, steps: int, seed: int, before: Callable[[int], None] | None = None
) -> None:
    """As `lm_pretraining.py` trains; `before` is called before each step."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if before is not None:
            before(step)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps)
        tokens = batch(text, generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def over_training(model: Any, text: torch.Tensor, optimizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """`g-SNR / sqrt(numel)` on the same two batches before, during and after a training."""
    fixed = batches(text, 2, 3)
    found = []

    def look(step: int) -> None:
        if step % max(1, args.steps // 10) == 0 or step == 1:
            found.append({"step": step, "excess": excess(model, fixed)})

    train(model, optimizer, text, args.steps, 0, look)
    look(args.steps)
    return found


def base_model(args: argparse.Namespace) -> Any:
    """A LLaMA that knows code."""
    base = llama(args.width, args.layers, seed=0)
    train(base, make_optimizer("adamw", base, 3e-3), data()[0], args.base_steps, seed=0)
    return base


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Everything but the ablation."""
    found: dict[str, Any] = {"conditions": {name: conditions(make, args) for name, make in MODELS.items()}}
    base = base_model(args)
    adapter = lora_model(base)
    pretrained = gpt2(args.width, args.layers, 0)
    found["training"] = {
        "GPT-2": over_training(pretrained, data()[0], make_optimizer("adamw", pretrained, 3e-3), args),
        "LoRA": over_training(adapter, documentation()[0], make_optimizer("adamw", adapter, 1e-2), args),
    }
    return found


def ablate_lora(base: Any, name: str, lr: float, seed: int, args: argparse.Namespace) -> float:
    """The held-out loss of an adapter."""
    texts = documentation()
    set_seed(seed)
    model = lora_model(base)
    train(model, make_optimizer(name, model, lr), texts[0], args.lora_steps, seed)
    return held_out_loss(model, texts[1])


def ablation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each task and learning rate: the result with either scale, seed by seed."""
    rows: list[dict[str, Any]] = []

    def add(task: str, unit: str, lr: float, run: Callable[[str, int], float]) -> None:
        rows.append({"task": task, "unit": unit, "lr": lr})
        rows[-1]["results"] = {name: [run(name, seed) for seed in range(args.seeds)] for name in SCALES}

    for name, architecture in (("LLaMA", "llama"), ("GPT-2", "gpt2")):
        sizes = {"width": args.width, "layers": args.layers, "architecture": architecture}
        for lr in LM_RATES:
            run = functools.partial(cached_train, lr=lr, steps=args.steps, **sizes)
            add(f"{name} from scratch", "loss", lr, lambda scale, seed, run=run: run(scale, seed=seed)["final"])
    base = base_model(args)
    for lr in LORA_RATES:
        add("LoRA, rank 4", "loss", lr, lambda scale, seed, lr=lr: ablate_lora(base, scale, lr, seed, args))
    for lr in VIT_RATES:
        fit = functools.partial(lr_wd_grid.train, "vit", lr=lr, decay=0.0, steps=args.vit_steps)
        add("ViT on digits", "% right", lr, lambda scale, seed, fit=fit: fit(scale, seed=seed)["accuracy"])
    return rows


def spread(values: Sequence[float]) -> str:
    """Least, median and largest."""
    return f"{min(values):.3f} / {statistics.median(values):.3f} / {max(values):.3f}"


def change_table(found: dict[str, Any], width: int, layers: int) -> str:
    """How far each measurement is from that of one batch."""
    models = {name: make(width, layers, 0) for name, make in MODELS.items()}
    models["LoRA"] = lora_model(models["LLaMA"])
    dimensions = {
        name: {each: param.ndim for each, param in model.named_parameters()} for name, model in models.items()
    }
    return markdown_table(["model", "measured", "matrices", "vectors"], change_rows(found, dimensions))


def change_rows(found: dict[str, Any], dimensions: dict[str, dict[str, int]]) -> list[list[str]]:
    """The ratio to one batch's measurement, over all matrices and over all vectors; of one batch, to `sqrt(numel)`."""
    rows = []
    for model, by_condition in found["conditions"].items():
        reference = by_condition["one batch"]
        for label, values in by_condition.items():
            row = [model, label]
            for matrices in (True, False):
                names = [name for name in values if (dimensions[model][name] > 1) == matrices and name in reference]
                shown = [values[name] if label == "one batch" else values[name] / reference[name] for name in names]
                row.append(spread(shown) if shown else "")
            rows.append(row)
    for model, history in found["training"].items():
        start = next(entry["excess"] for entry in history if entry["excess"].keys() >= history[-1]["excess"].keys())
        last = history[-1]["excess"]
        row = [model, f"after {history[-1]['step']} steps, same batches"]
        for matrices in (True, False):
            names = [name for name in last if (dimensions[model][name] > 1) == matrices]
            row.append(spread([last[name] / start[name] for name in names]) if names else "")
        rows.append(row)
    return rows


def ablation_table(ablated: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, and the difference seed by seed."""
    rows = []
    for row in ablated:
        digits = 4 if row["unit"] == "loss" else 1
        ours, size = (row["results"][name] for name in SCALES)
        differences = ", ".join(f"{a - b:+.{digits}f}" for a, b in zip(ours, size, strict=True))
        means = [f"{statistics.mean(each):.{digits}f}" for each in (ours, size)]
        rows.append([row["task"], row["unit"], f"{row['lr']:g}", *means, differences])
    scales = [f"scale = {label}" for label in SCALES.values()]
    return markdown_table(["task", "unit", "learning rate", *scales, "difference, seed by seed"], rows)


def plot(found: dict[str, Any], path: Path) -> None:
    """Left: the distribution by kind. Right: what a training changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2)
    for place, model in zip(axes[0], MODELS, strict=True):
        values = found["conditions"][model]["one batch"]
        kinds: dict[str, list[float]] = {}
        for name, value in values.items():
            kinds.setdefault(kind_of(name), []).append(value)
        for index, each in enumerate(kinds.values()):
            place.plot(each, [index] * len(each), "o", ms=5, alpha=0.6, color="#2a6f97")
        place.axvline(1.0, color="#888888", lw=1)
        place.set_yticks(range(len(kinds)), list(kinds), fontsize=8)
        place.invert_yaxis()
        place.set_xlabel("g-SNR / sqrt(numel), one batch, random weights")
        place.set_title(f"{model}: each tensor, by kind", loc="left", fontsize=11)
    for place, (model, history) in zip(axes[1], found["training"].items(), strict=True):
        paths: dict[str, list[tuple[int, float]]] = {}
        for entry in history:
            by_kind: dict[str, list[float]] = {}
            for name, value in entry["excess"].items():
                by_kind.setdefault(kind_of(name), []).append(value)
            for kind, each in by_kind.items():
                paths.setdefault(kind, []).append((entry["step"], statistics.median(each)))
        apart = sorted(paths, key=lambda kind: max(abs(math.log(value)) for _, value in paths[kind]), reverse=True)
        for kind in apart:
            style = {"label": kind, "zorder": 3} if kind in apart[:7] else {"color": "#cccccc"}
            place.plot(*zip(*paths[kind], strict=True), marker=".", lw=1.2, **style)
        place.axhline(1.0, color="#888888", lw=1)
        place.set_xlabel("steps of AdamW")
        place.set_ylabel("g-SNR / sqrt(numel), median of the kind")
        place.set_title(f"{model}: over training, on the same batches", loc="left", fontsize=11)
        place.legend(frameon=False, fontsize=8)
    for place in axes.flat:
        place.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, trains, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base_steps", type=int, default=300)
    parser.add_argument("--lora_steps", type=int, default=150)
    parser.add_argument("--vit_steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = finished("gsnr_stability", {"part": "measured", **vars(args)}, lambda: measured(args))
    ablated = finished("gsnr_stability", {"part": "ablation", **vars(args)}, lambda: ablation(args))
    changes = change_table(found, args.width, args.layers)
    text = (
        f"Byte-level models of {args.layers} layers, {args.width} wide, at random weights; the adapter's base was "
        f"trained for {args.base_steps} steps. Least / median / largest of `g-SNR / sqrt(numel)` in the rows of one "
        "batch; in the others, of the ratio to that measurement (to the first that was possible, for training).\n\n"
        f"{changes}\n\nThe same training with scales that were measured and with `sqrt(numel)`; {args.seeds} seeds."
        f"\n\n{ablation_table(ablated)}"
    )
    print(f"\n{text}")
    common.RESULTS.mkdir(exist_ok=True)
    plot(found, common.RESULTS / "gsnr_stability.png")
    known = {
        "machine": machine("transformers", "peft", "scikit-learn"),
        "command": command(__file__, argv),
        "setting": vars(args),
    }
    write_results("gsnr_stability", {**known, **found, "ablation": ablated}, text)


if __name__ == "__main__":
    main()
