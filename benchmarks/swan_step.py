"""
Time of one SWAN step beside torch.optim.Muon's, and beside the paper's listing taken one matrix at a time.

    python benchmarks/swan_step.py                      # 84 matrices of a 12-layer, 256-wide LLaMA
    python benchmarks/swan_step.py --model gpt2         # the 48 matrices of GPT-2 small, which are stored (in, out)
    python benchmarks/swan_step.py --model llama2048    # one layer of a 2048-wide LLaMA
    python benchmarks/swan_step.py --threads 1 --processor_time     # on a machine that is not idle

The contestants take turns, and a ratio is the median of the ratios round by round, so that other work on the machine
counts little. Muon and most of SWAN's whitenings multiply in bfloat16; the paper's iteration needs float32, which
hardware with bfloat16 units does several times slower. `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16` shows a CPU without AMX,
`AVX512_CORE_VNNI` one without bfloat16. Floating point operations are counted, so that the share of the hardware's
peak can be told from the share of the work. Writes `benchmarks/results/swan_step_<model>_<device>.json` and `.md`,
without the model for the first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import device_name, machine, markdown_table, peak_extra_bytes, synchronize, write_results
from torch.utils.flop_counter import FlopCounterMode

from hf_sai import SWAN


def llama_matrices(width: int, inner: int, layers: int) -> list[tuple[int, int]]:
    """Shapes of the seven matrices of each block."""
    return [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner)] * layers


def gpt2_matrices() -> list[tuple[int, int]]:
    """Shapes of GPT-2 small's, as transformers' Conv1D stores them: (in, out)."""
    return [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12


MUON = "torch.optim.Muon"
MODELS: dict[str, tuple[str, list[tuple[int, int]], str]] = {
    "llama256": ("84 matrices of a 12-layer, 256-wide LLaMA", llama_matrices(256, 688, 12), "matrix"),
    "gpt2": ("the 48 matrices of GPT-2 small", gpt2_matrices(), "matrix, transposed"),
    "llama2048": ("the 7 matrices of a layer of a 2048-wide LLaMA", llama_matrices(2048, 5504, 1), "matrix"),
}


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


def contestants(params: list[torch.nn.Parameter], route: str = "matrix") -> dict[str, Callable[[], Any]]:
    """One step of each, at a learning rate that leaves the parameters where they are."""

    def swan(**options: Any) -> Callable[[], Any]:
        return SWAN([{"params": params, "routes": [route] * len(params)}], lr=1e-6, **options).step

    return {
        "torch.optim.Muon": torch.optim.Muon(params, lr=1e-6, weight_decay=0.0).step,
        "SWAN": swan(),
        "SWAN, polar, 2 steps": swan(ns_steps=2),
        "SWAN, polar_express": swan(whitening="polar_express"),
        "SWAN, nsds": swan(whitening="nsds"),
        "SWAN, polar, float32": swan(whitening_dtype="float32"),
        "SWAN, newton_schulz (the paper's)": swan(whitening="newton_schulz"),
        "the paper's listing, one by one": lambda: listing(params, 1e-6),
        "AdamW fused": torch.optim.AdamW(params, lr=1e-6, fused=True).step,
    }


def measure(
    params: list[torch.nn.Parameter],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    route: str = "matrix",
    names: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """
    Milliseconds (median and least of interleaved rounds), the ratio to Muon's, operations, and the most bytes needed
    besides; of all contestants, or of Muon and those that are named.
    """
    steps = {name: step for name, step in contestants(params, route).items() if not names or name in (MUON, *names)}
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
        ratio = statistics.median(own / muon for own, muon in zip(values, times[MUON], strict=True))
        found[name] |= {"median": statistics.median(values), "least": min(values), "to_muon": ratio}
    return found


def main() -> None:
    """Measures, prints a table, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama256", choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows besides Muon's; all by default")
    parser.add_argument("--processor_time", action="store_true", help="of all threads together, not of the clock")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    what, shapes, route = MODELS[args.model]
    params = [torch.nn.Parameter(torch.randn(shape, device=device_name()) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    clock = time.process_time if args.processor_time else time.perf_counter
    found = measure(params, args.rounds, clock, route, args.only)
    rows = [
        [
            name,
            f"{values['to_muon']:.2f}",
            f"{values['median']:.1f}",
            f"{values['least']:.1f}",
            f"{values['gflop']:.1f}",
            f"{values['extra'] / 1e6:.1f}",
        ]
        for name, values in sorted(found.items(), key=lambda item: item[1]["to_muon"])
    ]
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
    header = ["optimizer", "to Muon", "median ms", "least ms", "GFLOP", "extra MB"]
    title = f"One step on {what}; {args.rounds} interleaved rounds, {args.threads} threads"
    title += ", milliseconds of the processor" if args.processor_time else ""
    title += f"; ONEDNN_MAX_CPU_ISA={isa}." if isa else "."
    text = f"{title}\n\n{markdown_table(header, rows)}"
    print(text)
    model = "" if args.model == "llama256" else f"{args.model}_"
    suffix = f"_{isa.lower()}" if isa else ""
    results = {"machine": machine(), "setting": vars(args), "isa": isa, "optimizers": found}
    write_results(f"swan_step_{model}{device_name()}{suffix}", results, text)


if __name__ == "__main__":
    main()
