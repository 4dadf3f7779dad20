"""
A LoRA adapter: a base model trained on code, the adapter on documentation; each optimizer tuned alike.

    python benchmarks/lora_finetuning.py               # ranks 4 and 16, four learning rates, three seeds
    python benchmarks/lora_finetuning.py --rank 4 --methods AdamW SGD-SaI

Every optimizer gets four learning rates over a decade and a half on seed 0, and the best of them two more seeds. The
loss is held-out, in nats per byte. "A frozen" is SGD-SaI as its published implementations train an adapter; "paired"
is `lora_policy="paired"`; LoRA+ is PEFT's, B at 16 times A's rate (the rate named is A's). SWAN's policies: B whitened
and Adam for A, both whitened, and B with GradNorm over its few columns, the plain reading of the paper.

An interrupted benchmark goes on where it was. Writes `benchmarks/results/lora_finetuning.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import command, device_name, finished, machine, markdown_table, write_results
from lm_pretraining import data, llama, make_optimizer, schedule
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import set_seed

import hf_sai
from hf_sai.optim.lora_pairs import A_RATE


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

NAME = "lora_finetuning"
BASE_BLOCKS = (16, 128)  # count and length of a batch
ADAPTER_BLOCKS = (8, 64)
HELD_OUT_BATCHES = 8
LORA_PLUS_RATIO = 16  # PEFT's documentation and its authors'


def lora_plus(model: Any, lr: float) -> Any:
    """PEFT's LoRA+ with AdamW."""
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=LORA_PLUS_RATIO)


def frozen_a(model: Any, lr: float) -> Any:
    """SGD-SaI that never moves A."""
    for name, param in model.named_parameters():
        if "lora_A" in name:
            param.requires_grad_(False)
    return hf_sai.create_optimizer("sgd_sai", model, lr=lr, weight_decay=0.0)


class EqualRates(hf_sai.SGDSaI):
    """Pairs whose A has B's learning rate."""

    def _paired_gradients(self, group: dict[str, Any]) -> dict[torch.Tensor, torch.Tensor]:
        found = super()._paired_gradients(group)
        for a in group["params"][::2]:
            if a in found:
                found[a] = found[a] / A_RATE
        return found


def equal_rates(model: Any, lr: float) -> Any:
    """SGD-SaI on pairs without the slower A."""
    return EqualRates(hf_sai.param_groups(model, "sgd_sai", lora_policy="paired"), lr=lr, weight_decay=0.0)


def plain_rows(model: Any, lr: float) -> Any:
    """SWAN on B, whose rows are taken as stored: outputs, with as many columns as the rank."""
    groups = hf_sai.param_groups(model, "swan", lora_policy="b_only")
    for group in groups:
        group["routes"] = ["matrix" if route != "adam" else route for route in group["routes"]]
    return hf_sai.SWAN(groups, lr=lr)


def ours(name: str, **options: Any) -> Callable[[Any, float], Any]:
    """One of `make_optimizer`'s."""
    return lambda model, lr: make_optimizer(name, model, lr, **options)


METHODS: dict[str, tuple[Callable[[Any, float], Any], tuple[float, ...]]] = {
    "AdamW": (ours("adamw"), (1e-3, 3e-3, 1e-2, 3e-2)),
    "SGD-SaI, paired": (ours("sgd_sai", lora_policy="paired"), (1e-3, 3e-3, 1e-2, 3e-2)),
    "SGD-SaI, paired, A at B's rate": (equal_rates, (1e-3, 3e-3, 1e-2, 3e-2)),
    "SGD-SaI": (ours("sgd_sai"), (1e-2, 3e-2, 1e-1, 3e-1)),
    "SGD-SaI, A frozen (as published)": (frozen_a, (1e-2, 3e-2, 1e-1, 3e-1)),
    "LoRA+": (lora_plus, (1e-4, 3e-4, 1e-3, 3e-3)),
    "SWAN, b_only": (ours("swan", lora_policy="b_only"), (3e-4, 1e-3, 3e-3, 1e-2)),
    "SWAN, both": (ours("swan", lora_policy="both"), (3e-4, 1e-3, 3e-3, 1e-2)),
    "SWAN, b_only, rows as stored": (plain_rows, (3e-4, 1e-3, 3e-3, 1e-2)),
}


def documentation() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the language reference: to train on, and held out."""
    from offline import documentation as topics

    texts = topics()
    found = ["\n".join(texts[split]["text"]).encode() for split in ("train", "test")]
    return torch.frombuffer(bytearray(found[0]), dtype=torch.uint8), torch.frombuffer(
        bytearray(found[1]), dtype=torch.uint8
    )


def blocks(text: torch.Tensor, generator: torch.Generator, size: tuple[int, int]) -> torch.Tensor:
    """A batch at random places."""
    starts = torch.randint(0, len(text) - size[1], (size[0],), generator=generator)
    return torch.stack([text[start : start + size[1]] for start in starts]).long().to(device_name())


def train(model: Any, optimizer: Any, text: torch.Tensor, steps: int, seed: int, size: tuple[int, int]) -> None:
    """Cosine with 10% warm-up, clipped at 1."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps)
        tokens = blocks(text, generator, size)
        loss = model(input_ids=tokens, labels=tokens).loss
        if not math.isfinite(loss.item()):
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out(model: Any, text: torch.Tensor) -> float:
    """On the same blocks at every call; infinity where it is no number."""
    generator = torch.Generator().manual_seed(12345)
    losses = [
        model(input_ids=tokens, labels=tokens).loss
        for tokens in (blocks(text, generator, BASE_BLOCKS) for _ in range(HELD_OUT_BATCHES))
    ]
    loss = torch.stack(losses).mean().item()
    return loss if math.isfinite(loss) else math.inf


def base_model(steps: int) -> Any:
    """Trained on code; kept for a benchmark that is interrupted."""
    model = llama(128, 4, seed=0)
    file = common.RUNS / f"{NAME}_base_{steps}_{device_name()}_torch{torch.__version__}.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    train(model, make_optimizer("adamw", model, 1e-3), data()[0], steps, 0, BASE_BLOCKS)
    common.RUNS.mkdir(exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def adapt(base: Any, method: str, rank: int, lr: float, seed: int, steps: int, texts: Any) -> float:
    """The held-out loss of an adapter after training."""
    set_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config).to(device_name())
    train(model, METHODS[method][0](model, lr), texts[0], steps, seed, ADAPTER_BLOCKS)
    return held_out(model, texts[1])


def tuned(rates: Sequence[float], seeds: int, run: Callable[[float, int], float]) -> dict[str, Any]:
    """The best of the rates on seed 0, its losses over the seeds, and the trials."""
    trials = {lr: run(lr, 0) for lr in rates}
    best = min(trials, key=lambda lr: trials[lr])
    losses = [trials[best], *(run(best, seed) for seed in range(1, seeds))]
    return {"lr": best, "losses": losses, "trials": {f"{lr:g}": loss for lr, loss in trials.items()}}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Best first."""
    rows = [
        [
            method,
            f"{result['lr']:g}",
            f"{statistics.mean(result['losses']):.3f}",
            f"{min(result['losses']):.3f} to {max(result['losses']):.3f}",
            ", ".join(f"{lr}: {loss:.3f}" for lr, loss in result["trials"].items()),
        ]
        for method, result in sorted(results.items(), key=lambda item: statistics.mean(item[1]["losses"]))
    ]
    header = ["optimizer", "learning rate", "held-out loss", "over the seeds", "by learning rate, seed 0"]
    return markdown_table(header, rows)


def plot(by_rank: dict[int, dict[str, dict[str, Any]]], before: float, path: Path) -> None:
    """Loss against learning rate, for each rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(by_rank), sharey=True, squeeze=False)[0]
    colors = {method: f"C{index}" for index, method in enumerate(METHODS)}
    lowest = min(min(result["losses"]) for results in by_rank.values() for result in results.values())
    for axes, (rank, results) in zip(panels, by_rank.items(), strict=True):
        for method, result in results.items():
            rates, losses = zip(*result["trials"].items(), strict=True)
            axes.plot([float(rate) for rate in rates], losses, marker="o", ms=4, label=method, color=colors[method])
        axes.axhline(before, color="#888888", lw=1, ls="--")
        axes.annotate("before", (0.01, before), xycoords=("axes fraction", "data"), color="#555555", va="bottom")
        axes.set_xscale("log")
        axes.set_ylim(lowest - 0.03, before + 0.45)
        axes.set_xlabel("learning rate")
        axes.set_title(f"LoRA, r = {rank}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss (nats per byte), seed 0")
    handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--base_steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    base, texts = base_model(args.base_steps), documentation()
    before = held_out(base, texts[1])
    fixed = {"steps": args.steps, "base_steps": args.base_steps, "blocks": [*ADAPTER_BLOCKS, HELD_OUT_BATCHES]}

    def run(method: str, rank: int, lr: float, seed: int) -> float:
        setting = {"method": method, "rank": rank, "lr": lr, "seed": seed, **fixed}
        loss = finished(NAME, setting, lambda: adapt(base, method, rank, lr, seed, args.steps, texts))
        print(f"  r={rank} {method:<34} lr {lr:<6g} seed {seed}: {loss:.4f}", flush=True)
        return float(loss)

    by_rank: dict[int, dict[str, dict[str, Any]]] = {
        rank: {
            method: tuned(METHODS[method][1], args.seeds, functools.partial(run, method, rank))
            for method in args.methods
        }
        for rank in args.rank
    }
    common.RESULTS.mkdir(exist_ok=True)
    plot(by_rank, before, common.RESULTS / f"{NAME}.png")
    text = (
        f"LoRA on a byte-level LLaMA (4 layers, 128 wide, {args.base_steps} steps on code; all linear layers, alpha = "
        f"2 r), {args.steps} steps of {ADAPTER_BLOCKS[0]} x {ADAPTER_BLOCKS[1]} bytes of documentation; {before:.3f} "
        f"before; the best of four learning rates on seed 0, then the mean of {args.seeds} seeds."
    )
    text += "".join(f"\n\nr = {rank}:\n\n{table(results)}" for rank, results in by_rank.items())
    print(f"\n{text}")
    about = {"machine": machine("transformers", "peft"), "command": command(__file__, argv), "setting": vars(args)}
    write_results(NAME, {**about, "before": before, "ranks": by_rank}, text)


if __name__ == "__main__":
    main()
