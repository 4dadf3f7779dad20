"""
A LoRA adapter: a base model trained on code, the adapter on documentation; each optimizer tuned alike.

    python benchmarks/lora_finetuning.py                    # rank 4, 200 steps
    python benchmarks/lora_finetuning.py --rank 16

Held-out loss in nats per byte. "A frozen" is SGD-SaI as its published implementations train an adapter. SWAN's
policies: B whitened and Adam for A, both whitened, and B with GradNorm over its few columns, the plain reading of the
paper. Writes `benchmarks/results/lora_finetuning_r<rank>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import device_name, machine, markdown_table, write_results
from lm_pretraining import LENGTH, batch, data, llama, make_optimizer, schedule
from peft import LoraConfig, get_peft_model
from transformers import set_seed

import hf_sai


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

HELD_OUT_BATCHES = 16


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


METHODS: dict[str, tuple[Callable[[Any, float], Any], tuple[float, ...]]] = {
    "AdamW": (lambda model, lr: make_optimizer("adamw", model, lr), (3e-3, 1e-2, 3e-2)),
    "SGD-SaI": (lambda model, lr: make_optimizer("sgd_sai", model, lr), (0.03, 0.1, 0.3)),
    "SGD-SaI, A frozen (as published)": (frozen_a, (0.1, 0.3, 1.0)),
    "SWAN, b_only": (lambda model, lr: make_optimizer("swan", model, lr, lora_policy="b_only"), (1e-3, 3e-3, 1e-2)),
    "SWAN, both": (lambda model, lr: make_optimizer("swan", model, lr, lora_policy="both"), (1e-3, 3e-3, 1e-2)),
    "SWAN, b_only, rows as stored": (plain_rows, (1e-3, 3e-3, 1e-2)),
}


def documentation() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the language reference: to train on, and held out."""
    from offline import documentation as topics

    texts = topics()
    found = ["\n".join(texts[split]["text"]).encode() for split in ("train", "test")]
    return torch.frombuffer(bytearray(found[0]), dtype=torch.uint8), torch.frombuffer(
        bytearray(found[1]), dtype=torch.uint8
    )


def train(model: Any, optimizer: Any, text: torch.Tensor, steps: int, seed: int) -> None:
    """Cosine with 10% warm-up, clipped at 1; `LENGTH` bytes in a block."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps)
        tokens = batch(text, generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out(model: Any, text: torch.Tensor) -> float:
    """On the same blocks at every call; infinity where it is no number."""
    generator = torch.Generator().manual_seed(12345)
    losses = [
        model(input_ids=tokens, labels=tokens).loss
        for tokens in (batch(text, generator) for _ in range(HELD_OUT_BATCHES))
    ]
    loss = torch.stack(losses).mean().item()
    return loss if math.isfinite(loss) else math.inf


def adapt(base: Any, method: str, lr: float, seed: int, args: argparse.Namespace, texts: Any) -> float:
    """The held-out loss of an adapter after training."""
    set_seed(seed)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config).to(device_name())
    train(model, METHODS[method][0](model, lr), texts[0], args.steps, seed)
    loss = held_out(model, texts[1])
    print(f"  {method:<34} lr {lr:<6g} seed {seed}: {loss:.4f}", flush=True)
    return loss


def main() -> None:
    """Trains, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base_steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = llama(128, 4, seed=0)
    train(base, make_optimizer("adamw", base, 1e-3), data()[0], args.base_steps, seed=0)
    texts = documentation()
    before = held_out(base, texts[1])
    results: dict[str, Any] = {}
    for method, (_, rates) in METHODS.items():
        trials = {lr: adapt(base, method, lr, 0, args, texts) for lr in rates}
        best = min(trials, key=lambda lr: trials[lr])
        losses = [trials[best], *(adapt(base, method, best, seed, args, texts) for seed in range(1, args.seeds))]
        results[method] = {"lr": best, "losses": losses, "trials": {str(lr): loss for lr, loss in trials.items()}}
    ordered = sorted(results.items(), key=lambda item: statistics.mean(item[1]["losses"]))
    rows = [
        [
            method,
            f"{result['lr']:g}",
            f"{statistics.mean(result['losses']):.3f}",
            ", ".join(f"{lr}: {loss:.3f}" for lr, loss in result["trials"].items()),
        ]
        for method, result in ordered
    ]
    table = markdown_table(["optimizer", "learning rate", "held-out loss", "by learning rate, seed 0"], rows)
    text = (
        f"LoRA r = {args.rank} on a byte-level LLaMA (4 layers, 128 wide, {args.base_steps} steps on code), "
        f"{args.steps} steps of 16 x {LENGTH} bytes of documentation; {before:.3f} before; mean of {args.seeds} seeds "
        f"at the best of three learning rates.\n\n{table}"
    )
    print(f"\n{text}")
    results = {"machine": machine("transformers", "peft"), "setting": vars(args), "before": before, "methods": results}
    write_results(f"lora_finetuning_r{args.rank}", results, text)


if __name__ == "__main__":
    main()
