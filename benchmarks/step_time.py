"""
Time of one optimizer step, peers side by side in one run; the ratios are the point.

    python benchmarks/step_time.py                      # GPT-2 small and a LoRA-sized list on this machine's device
    python benchmarks/step_time.py --models gpt2 gpt2-medium lora --rounds 15

Writes `benchmarks/results/step_time_<device>.json`. Peers that are not installed are left out, and said so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_sai import SGDSaI


RESULTS = Path(__file__).parent / "results"


def gpt2_shapes(width: int, layers: int) -> list[tuple[int, ...]]:
    """Shapes of GPT-2's parameters, the head tied."""
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


def lora_shapes(width: int, layers: int, rank: int) -> list[tuple[int, ...]]:
    """An adapter on the four matrices of each GPT-2 block."""
    pairs = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return [shape for _ in range(layers) for fan_in, out in pairs for shape in ((rank, fan_in), (out, rank))]


MODELS = {
    "gpt2": gpt2_shapes(768, 12),
    "gpt2-medium": gpt2_shapes(1024, 24),
    "lora": lora_shapes(768, 12, 8),
}


def peers() -> dict[str, Callable[[list[Any]], torch.optim.Optimizer]]:
    """Optimizers by name; all with weight decay, so that each does the same work."""
    found: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
        "hf_sai": lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.01),
        "hf_sai, fused=True": lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.01, fused=True),
        "hf_sai, no decay": lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.0),
        "hf_sai, foreach": lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.01, foreach=True),
        "hf_sai, plain": lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.01, foreach=False, fused=False),
        "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9, weight_decay=0.01, fused=True),
        "SGD foreach": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9, weight_decay=0.01, foreach=True),
        "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True),
    }
    try:
        from sgd_sai import SGD_sai

        found["sgd-sai"] = lambda p: SGD_sai(p, lr=1e-6)
    except ImportError:
        print("sgd-sai is not installed: left out")
    try:
        from pytorch_optimizer import SGDSaI as TheirSGDSaI

        found["pytorch-optimizer"] = lambda p: TheirSGDSaI(p, lr=1e-6, weight_decay=0.01, foreach=True)
    except ImportError:
        print("pytorch-optimizer is not installed: left out")
    return found


def measure(shapes: list[tuple[int, ...]], device: str, rounds: int) -> dict[str, tuple[float, float]]:
    """
    Milliseconds per step: the least of the rounds, which other work on the machine disturbs least, and the median. The
    peers take turns, so that a slow spell hits all of them.
    """
    optimizers = {}
    grads = [torch.randn(shape, device=device) * 1e-3 for shape in shapes]
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for name, make in peers().items():  # the same parameters and gradients for all: only the state is their own
        optimizers[name] = make(params)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            synchronize(device)
            start = time.perf_counter()
            optimizer.step()
            synchronize(device)
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (min(values), statistics.median(values)) for name, values in times.items()}


def synchronize(device: str) -> None:
    """Waits for an accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions("torch", "hf_sai", "sgd-sai", "pytorch-optimizer"),
        "date": datetime.date.today().isoformat(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Measures, prints a table, writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2", "lora"], choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"machine": machine(device), "rounds": args.rounds, "milliseconds": {}}
    for model in args.models:
        found = measure(MODELS[model], device, args.rounds)
        results["milliseconds"][model] = {
            name: {"least": round(least, 3), "median": round(median, 3)} for name, (least, median) in found.items()
        }
        peer = "SGD foreach" if model == "lora" else "SGD fused"
        print(f"\n{model}: {sum(torch.Size(s).numel() for s in MODELS[model]) / 1e6:.1f} M parameters")
        print(f"  {'':<20}{'least':>10}{'median':>10} ms   {'ratio of the least to ' + peer}")
        for name, (least, median) in sorted(found.items(), key=lambda item: item[1]):
            print(f"  {name:<20}{least:>10.2f}{median:>10.2f} ms   {least / found[peer][0]:>6.2f}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"step_time_{device}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}")


if __name__ == "__main__":
    main()
