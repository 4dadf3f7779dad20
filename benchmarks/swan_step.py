"""
Time of one SWAN step beside torch.optim.Muon's, and beside the paper's listing taken one matrix at a time.

    python benchmarks/swan_step.py                          # 84 matrices of a 12-layer, 256-wide LLaMA
    python benchmarks/swan_step.py --width 2048 --inner 5504 --layers 4     # on a GPU

Muon and SWAN's default whitening multiply in bfloat16; the paper's iteration needs float32, which hardware with
bfloat16 units does several times slower. `ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI` shows a CPU without them. Floating
point operations are counted, so that the share of the hardware's peak can be told from the share of the work.
Writes `benchmarks/results/swan_step_<device>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import device_name, machine, markdown_table, peak_extra_bytes, synchronize, write_results
from torch.utils.flop_counter import FlopCounterMode

from hf_sai import SWAN


def llama_matrices(width: int, inner: int, layers: int) -> list[tuple[int, int]]:
    """Shapes of the seven matrices of each block."""
    return [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner)] * layers


@torch.no_grad()
def listing(params: list[torch.nn.Parameter], lr: float, steps: int = 10) -> None:
    """SWAN as the paper's Algorithms 1 to 3 write it: one matrix after the other, float32, identity and all."""
    for param in params:
        assert param.grad is not None
        normed = (param.grad - param.grad.mean(1, keepdim=True)) / param.grad.std(1, keepdim=True, unbiased=False)
        x = normed if normed.shape[0] <= normed.shape[1] else normed.T
        norm = x.norm()
        y, z = x @ x.T / norm**2, torch.eye(x.shape[0], device=x.device)
        for _ in range(steps):
            t = 3 * torch.eye(x.shape[0], device=x.device) - z @ y
            y, z = 0.5 * y @ t, 0.5 * t @ z
        whitened = z @ x / norm
        whitened = whitened if normed.shape[0] <= normed.shape[1] else whitened.T
        param -= lr * normed.norm() / whitened.norm() * whitened


def contestants(params: list[torch.nn.Parameter]) -> dict[str, Callable[[], Any]]:
    """One step of each, at a learning rate that leaves the parameters where they are."""
    return {
        "torch.optim.Muon": torch.optim.Muon(params, lr=1e-6, weight_decay=0.0).step,
        "SWAN": SWAN(params, lr=1e-6).step,
        "SWAN, float32": SWAN(params, lr=1e-6, whitening_dtype="float32").step,
        "SWAN, newton_schulz (the paper's)": SWAN(params, lr=1e-6, whitening="newton_schulz").step,
        "the paper's listing, one by one": lambda: listing(params, 1e-6),
        "AdamW fused": torch.optim.AdamW(params, lr=1e-6, fused=True).step,
    }


def measure(
    params: list[torch.nn.Parameter], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Milliseconds (median and least of interleaved rounds), operations, and the most bytes needed besides."""
    steps = contestants(params)
    times: dict[str, list[float]] = {name: [] for name in steps}
    found: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        found[name] = {"gflop": counter.get_total_flops() / 1e9, "extra": peak_extra_bytes(step)}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize()
            start = clock()
            step()
            synchronize()
            times[name].append((clock() - start) * 1e3)
    for name, values in times.items():
        found[name] |= {"median": statistics.median(values), "least": min(values)}
    return found


def main() -> None:
    """Measures, prints a table, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--inner", type=int, default=688)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = llama_matrices(args.width, args.inner, args.layers)
    params = [torch.nn.Parameter(torch.randn(shape, device=device_name()) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    found = measure(params, args.rounds)
    muon, one_by_one = found["torch.optim.Muon"], found["the paper's listing, one by one"]
    rows = [
        [
            name,
            f"{values['median'] / muon['median']:.2f}",
            f"{values['median'] / one_by_one['median']:.2f}",
            f"{values['median']:.1f}",
            f"{values['least']:.1f}",
            f"{values['gflop']:.1f}",
            f"{values['extra'] / 1e6:.1f}",
        ]
        for name, values in sorted(found.items(), key=lambda item: item[1]["median"])
    ]
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
    header = ["optimizer", "to Muon", "to the listing", "median ms", "least ms", "GFLOP", "extra MB"]
    title = (
        f"One step on {len(shapes)} matrices, {args.width} wide, {args.layers} layers; medians of {args.rounds} rounds"
    )
    title += f"; ONEDNN_MAX_CPU_ISA={isa}." if isa else "."
    text = f"{title}\n\n{markdown_table(header, rows)}"
    print(text)
    suffix = f"_{isa.lower()}" if isa else ""
    results = {"machine": machine(), "setting": vars(args), "isa": isa, "optimizers": found}
    write_results(f"swan_step_{device_name()}{suffix}", results, text)


if __name__ == "__main__":
    main()
