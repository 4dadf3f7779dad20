"""
Why a LoRA adapter diverges under SGD-SaI: the first steps of one at a rate that is too high, factor by factor.

    python benchmarks/lora_steps.py

The model, data and adapter of `lora_finetuning.py`, whose base model it takes (and trains, where there is none yet).
For every step the layer whose B has the largest gradient at the first one is shown: norms of B, A, of their gradients
and of the moves that SGD-SaI made of them. Writes `benchmarks/results/lora_steps.json` and `.md`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from common import command, finished, machine, markdown_table, write_results
from lm_pretraining import make_optimizer, schedule
from lora_finetuning import ADAPTER_BLOCKS, base_model, blocks, documentation
from peft import LoraConfig, get_peft_model
from transformers import set_seed


HEADER = ["step", "loss", "B", "A", "gradient of B", "gradient of A", "move of B", "move of A"]
OF_SCHEDULE = 100  # the warm-up is a tenth of it, as in lora_finetuning.py


def steps_of(base: Any, rank: int, lr: float, policy: str, count: int) -> dict[str, Any]:
    """Norms over the first steps, of the layer with the largest first gradient; and of all B at the first step."""
    set_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = make_optimizer("sgd_sai", model, lr, lora_policy=policy)
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    text, generator = documentation()[0], torch.Generator().manual_seed(0)
    rows: list[list[float]] = []
    first: dict[str, float] = {}
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, OF_SCHEDULE)
        tokens = blocks(text, generator, ADAPTER_BLOCKS)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        first = first or {name: p.grad.norm().item() for name, p in named.items() if "lora_B" in name}
        largest = max(first, key=lambda name: first[name])
        factors = [named[largest], named[largest.replace("lora_B", "lora_A")]]
        gradients = [param.grad.norm().item() for param in factors]
        before = [param.detach().clone() for param in factors]
        optimizer.step()
        optimizer.zero_grad()
        moves = [(param.detach() - old).norm().item() for param, old in zip(factors, before, strict=True)]
        rows.append([loss.item(), *(old.norm().item() for old in before), *gradients, *moves])
    return {"layer": largest.split("layers.")[1].removesuffix(".lora_B.default.weight"), "first": first, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--paired_lr", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--base_steps", type=int, default=600)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    base = base_model(args.base_steps)
    runs: dict[str, Any] = {}
    for policy, lr in (("plain", args.lr), ("paired", args.paired_lr)):
        setting = {"policy": policy, "lr": lr, **{k: getattr(args, k) for k in ("rank", "steps", "base_steps")}}
        runs[policy] = finished(
            "lora_steps", setting, lambda lr=lr, policy=policy: steps_of(base, args.rank, lr, policy, args.steps)
        )
    first = sorted(runs["plain"]["first"].values())
    text = (
        f"LoRA r = {args.rank} with SGD-SaI on the model of lora_finetuning.py, seed 0, learning rate {args.lr:g} "
        f"after ten steps of warm-up. Norms of the gradients of the {len(first)} B at the first step: from "
        f"{first[0]:.4f} to {first[-1]:.3f}, median {statistics.median(first):.3f}. The layer with the largest, "
        f"{runs['plain']['layer']}, over the steps (norms):\n\n"
    )
    tables = [
        markdown_table(HEADER, [[i + 1, *(f"{x:.3f}" for x in row)] for i, row in enumerate(runs[policy]["rows"])])
        for policy in ("plain", "paired")
    ]
    text += tables[0] + f"\n\nThe same with lora_policy=paired, learning rate {args.paired_lr:g}:\n\n" + tables[1]
    print(text)
    about = {"machine": machine("transformers", "peft"), "command": command(__file__, argv), "setting": vars(args)}
    write_results("lora_steps", {**about, "runs": runs}, text)


if __name__ == "__main__":
    main()
