"""
A LoRA adapter: a base model trained on code, the adapter on documentation; each optimizer tuned alike.

    python benchmarks/lora_finetuning.py               # ranks 4 and 16, four learning rates, three seeds
    python benchmarks/lora_finetuning.py --rank 4 --methods AdamW SGD-SaI

Every optimizer gets four learning rates over a decade and a half on seed 0, and the best of them two more seeds. The
loss is held-out, in nats per byte. "A frozen" is SGD-SaI as its published implementations train an adapter; "paired"
is `lora_policy="paired"`; LoRA+ is PEFT's, B at 16 times A's rate (the rate named is A's). SWAN's policies: B whitened
and Adam for A, both whitened, and B with GradNorm over its few columns, the plain reading of the paper.

Each run is written when it ends, and an interrupted benchmark goes on where it was, if setting and versions are the
same. Writes `benchmarks/results/lora_finetuning.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, device_name, machine, markdown_table, write_results
from lm_pretraining import data, llama, make_optimizer, schedule
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import set_seed

import hf_sai


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
    "SGD-SaI": (ours("sgd_sai"), (1e-2, 3e-2, 1e-1, 3e-1)),
    "SGD-SaI, A frozen (as published)": (frozen_a, (3e-2, 1e-1, 3e-1, 1.0)),
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


def base_model(steps: int, keep: Path) -> Any:
    """Trained on code; kept for a benchmark that is interrupted."""
    model = llama(128, 4, seed=0)
    file = keep / f"hf_sai_lora_base_{steps}_{device_name()}_torch{torch.__version__}.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    train(model, make_optimizer("adamw", model, 1e-3), data()[0], steps, 0, BASE_BLOCKS)
    torch.save(model.state_dict(), file)
    return model


def adapt(base: Any, method: str, rank: int, lr: float, seed: int, steps: int, texts: Any) -> float:
    """The held-out loss of an adapter after training."""
    set_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config).to(device_name())
    train(model, METHODS[method][0](model, lr), texts[0], steps, seed, ADAPTER_BLOCKS)
    return held_out(model, texts[1])


class Runs:
    """Finished runs, by rank, method, learning rate and seed; kept in the result file as they end."""

    def __init__(self, known: dict[str, Any]) -> None:
        """`known`: machine and setting; runs of another setting or of other versions are not taken over."""
        self.known, self.losses = known, {}
        file = RESULTS / f"{NAME}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            same = found.get("setting") == known["setting"]
            if same and found["machine"]["versions"] == known["machine"]["versions"]:
                self.losses = {key: math.inf if loss is None else loss for key, loss in found["runs"].items()}

    def get(self, rank: int, method: str, lr: float, seed: int) -> float | None:
        """The loss of a run that ended."""
        return self.losses.get(f"r={rank}; {method}; lr {lr:g}; seed {seed}")

    def loss(self, rank: int, method: str, lr: float, seed: int, run: Callable[..., float]) -> float:
        """Runs it where it was not yet."""
        found = self.get(rank, method, lr, seed)
        if found is None:
            found = run(method, rank, lr, seed)
            self.losses[f"r={rank}; {method}; lr {lr:g}; seed {seed}"] = found
            print(f"  r={rank} {method:<34} lr {lr:<6g} seed {seed}: {found:.4f}", flush=True)
            self.write()
        return found

    def write(self) -> None:
        """Infinity is no JSON, so a run that ended in no number is null."""
        runs = {key: loss if math.isfinite(loss) else None for key, loss in self.losses.items()}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{NAME}.json").write_text(json.dumps({**self.known, "runs": runs}, indent=1) + "\n")

    def rank(self, rank: int, seeds: int) -> dict[str, dict[str, Any]]:
        """Of each method that has all its learning rates: the best, its losses over the seeds, and the trials."""
        found = {}
        for method, (_, rates) in METHODS.items():
            trials = {lr: self.get(rank, method, lr, 0) for lr in rates}
            if None in trials.values():
                continue
            best = min(trials, key=lambda lr: trials[lr])
            losses = [loss for seed in range(seeds) if (loss := self.get(rank, method, best, seed)) is not None]
            found[method] = {"lr": best, "losses": losses, "trials": trials}
        return dict(sorted(found.items(), key=lambda item: statistics.mean(item[1]["losses"])))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Best first."""
    rows = [
        [
            method,
            f"{result['lr']:g}",
            f"{statistics.mean(result['losses']):.3f}",
            f"{min(result['losses']):.3f} to {max(result['losses']):.3f} ({len(result['losses'])})",
            ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in result["trials"].items()),
        ]
        for method, result in results.items()
    ]
    header = ["optimizer", "learning rate", "held-out loss", "over the seeds", "by learning rate, seed 0"]
    return markdown_table(header, rows)


def plot(by_rank: dict[int, dict[str, dict[str, Any]]], before: float, path: Path) -> None:
    """Loss against learning rate as a multiple of each method's best, for each rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(by_rank), sharey=True, squeeze=False)[0]
    colors = {method: f"C{index}" for index, method in enumerate(METHODS)}
    lowest = min(min(result["losses"]) for results in by_rank.values() for result in results.values())
    for axes, (rank, results) in zip(panels, by_rank.items(), strict=True):
        for method, result in results.items():
            rates, losses = zip(*result["trials"].items(), strict=True)
            axes.plot(rates, losses, marker="o", ms=4, label=method, color=colors[method])
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


def main() -> None:
    """Trains what is missing, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--base_steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()), help="where the base model is kept")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = base_model(args.base_steps, args.keep)
    texts = documentation()
    before = held_out(base, texts[1])
    setting = {name: getattr(args, name) for name in ("steps", "base_steps", "seeds")}
    setting |= {"adapter_blocks": list(ADAPTER_BLOCKS), "held_out_batches": HELD_OUT_BATCHES}
    command = "python benchmarks/lora_finetuning.py"
    known = {"machine": machine("transformers", "peft"), "command": command, "setting": setting, "before": before}
    runs = Runs(known)

    def run(method: str, rank: int, lr: float, seed: int) -> float:
        return adapt(base, method, rank, lr, seed, args.steps, texts)

    for method in args.methods:
        for rank in args.rank:
            trials = {lr: runs.loss(rank, method, lr, 0, run) for lr in METHODS[method][1]}
            best = min(trials, key=lambda lr: trials[lr])
            for seed in range(1, args.seeds):
                runs.loss(rank, method, best, seed, run)
    by_rank = {rank: found for rank in (4, 16) if (found := runs.rank(rank, args.seeds))}
    plot(by_rank, before, RESULTS / f"{NAME}.png")
    text = (
        f"LoRA on a byte-level LLaMA (4 layers, 128 wide, {args.base_steps} steps on code; all linear layers, alpha = "
        f"2 r), {args.steps} steps of {ADAPTER_BLOCKS[0]} x {ADAPTER_BLOCKS[1]} bytes of documentation; {before:.3f} "
        f"before; the best of four learning rates on seed 0, then mean of seeds (their number in brackets); "
        f"`{command}`."
    )
    text += "".join(f"\n\n## r = {rank}\n\n{table(results)}" for rank, results in by_rank.items())
    print(f"\n{text}")
    runs.write()
    kept = json.loads((RESULTS / f"{NAME}.json").read_text())
    write_results(NAME, kept, text)


if __name__ == "__main__":
    main()
