"""
One optimizer step, peers side by side in one run: time, state, extra memory, first step. The ratios are the point.

    python benchmarks/optimizer_step.py                      # every model that fits
    python benchmarks/optimizer_step.py --models "GPT-2 small" --rounds 15 --keep     # others as they were written
    python benchmarks/optimizer_step.py --before ../84349af  # beside the optimizer of another checkout

Writes `benchmarks/results/optimizer_step_<device>.json` and `.md`. Peers that are not installed are left out, and
said so. All peers take turns on the same parameters and gradients, so that a slow spell hits all of them. Gradients
are clipped before the step, as a Trainer does by itself, but for one row.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from common import RESULTS, device_name, machine, markdown_table, peak_extra_bytes, synchronize, write_results

from hf_sai import SGDSaI, optimizer_state_bytes
from hf_sai.optim.clip_guard import listen


Shapes = list[tuple[int, ...]]


def gpt2_shapes(width: int, layers: int) -> Shapes:
    """Shapes of GPT-2's parameters, the head tied."""
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


def vit_shapes(width: int, layers: int, classes: int = 1000) -> Shapes:
    """Shapes of a ViT with patches of 16 x 16 in a picture of 224 x 224."""
    square = [(width, width), (width,)]
    block = [(width,), (width,), *square * 4, (width,), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    stem = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*stem, *block * layers, (width,), (width,), (classes, width), (classes,)]


def llama_shapes(width: int, inner: int, layers: int) -> Shapes:
    """Shapes of the blocks of a LLaMA, without table and head."""
    return [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner), (width,), (width,)] * layers


def lora_shapes(width: int, layers: int, rank: int) -> Shapes:
    """An adapter on the four matrices of each GPT-2 block."""
    pairs = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return [shape for _ in range(layers) for fan_in, out in pairs for shape in ((rank, fan_in), (out, rank))]


MODELS = {
    "GPT-2 small": gpt2_shapes(768, 12),
    "GPT-2 medium": gpt2_shapes(1024, 24),
    "GPT-2 XL": gpt2_shapes(1600, 48),
    "ViT-S/16": vit_shapes(384, 12),
    "Llama-2-7B layers": llama_shapes(4096, 11008, 32),
    "LoRA r=4 on GPT-2 medium": lora_shapes(1024, 24, 4),
}
OURS = "SGD-SaI"
NOT_CLIPPED = "SGD-SaI, not clipped"
BASELINE = {"LoRA r=4 on GPT-2 medium": "SGD foreach"}  # the others: SGD fused


def of_another_checkout(folder: str) -> Any:
    """`SGDSaI` of `hf_sai` in a folder, under another name."""
    path = Path(folder) / "hf_sai" / "optim"
    spec = importlib.util.spec_from_file_location("optim_before", path / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["optim_before"] = module
    spec.loader.exec_module(module)
    return module.SGDSaI


def peers(compiled: bool, before: str | None = None) -> dict[str, Callable[[list[Any]], torch.optim.Optimizer]]:
    """Optimizers by name; all with weight decay, so that each does the same work."""
    found: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
        OURS: lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.01),
        NOT_CLIPPED: lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.01),
        "SGD-SaI foreach": lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.01, foreach=True),
        "SGD-SaI plain": lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.01, foreach=False, fused=False),
        "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9, weight_decay=0.01, fused=True),
        "SGD foreach": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9, weight_decay=0.01, foreach=True),
        "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.01, fused=True),
        "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.01, foreach=True),
    }
    if before:
        earlier = of_another_checkout(before)
        found[f"SGD-SaI of {Path(before).name}"] = lambda p: earlier(p, lr=1e-6, weight_decay=0.01)
    if compiled:
        found["SGD-SaI fused=True"] = lambda p: SGDSaI(p, lr=1e-6, weight_decay=0.01, fused=True)
    try:
        from sgd_sai import SGD_sai

        found["sgd-sai"] = lambda p: SGD_sai(p, lr=1e-6, weight_decay=0.01)
    except ImportError:
        print("sgd-sai is not installed: left out")
    try:
        from pytorch_optimizer import SGDSaI as TheirSGDSaI

        found["pytorch-optimizer"] = lambda p: TheirSGDSaI(p, lr=1e-6, weight_decay=0.01, foreach=True)
    except ImportError:
        print("pytorch-optimizer is not installed: left out")
    return found


def available_bytes() -> float:
    """What others leave, and a third of that is theirs."""
    return (torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available) * 2 / 3


def fitting(shapes: Shapes, dtype: torch.dtype) -> Shapes:
    """As many of the tensors as fit: parameters, gradients, two moments and four words for the peers' temporaries."""
    budget = available_bytes() / (8 * dtype.itemsize)
    kept: Shapes = []
    for shape in shapes:
        budget -= torch.Size(shape).numel()
        if budget < 0:
            break
        kept.append(shape)
    return kept


def measure(
    model: str,
    precision: str,
    rounds: int,
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
    before: str | None = None,
) -> tuple[Shapes, dict[str, dict[str, float]]]:
    """
    The shapes that fit, and by optimizer: least and median milliseconds of a step, milliseconds of the first, bytes of
    state, and the most bytes that a step needs besides.

    Of large models one optimizer's state stands in memory at a time, and the peers don't take turns.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device, dtype = device_name(), getattr(torch, precision)
    shapes = fitting(MODELS[model], dtype)
    grads = [(torch.randn(shape, device=device) * 1e-3).to(dtype) for shape in shapes]
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    give(params, grads)
    listen()
    torch.nn.utils.clip_grad_norm_(params, math.inf)
    found: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {}
    makers = peers(dtype != torch.float32, before)
    # Each a buffer, two of them two; and temporaries.
    together = (len(makers) + 6) * sum(param.nbytes for param in params) < available_bytes() or device == "cuda"
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, make in makers.items():
        optimizer = make(params)
        give(params, grads, clipped=name != NOT_CLIPPED)
        with contextlib.redirect_stdout(io.StringIO()):  # one of them prints a banner
            first = milliseconds(optimizer, clock)
        extra = peak_extra_bytes(optimizer.step)
        found[name] = {"first": first, "state": optimizer_state_bytes(optimizer), "extra": extra}
        times[name] = []
        if together:
            optimizers[name] = optimizer
        else:
            milliseconds(optimizer, clock)
            times[name] = [milliseconds(optimizer, clock) for _ in range(rounds)]
            del optimizer
    turns, dice = list(optimizers.items()), random.Random(0)
    for _ in range(rounds if together else 0):
        dice.shuffle(turns)  # what a peer leaves in the cache is worth 5% to the next
        for name, optimizer in turns:
            give(params, grads, clipped=name != NOT_CLIPPED)
            times[name].append(milliseconds(optimizer, clock))
    for name, values in times.items():
        found[name] |= {"least": min(values), "median": statistics.median(values)}
    return shapes, found


def give(params: list[Any], grads: list[Any], clipped: bool = True) -> None:
    """Gradients of which clipping has taken the norm, or the same as if nobody had looked at them."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad if clipped else grad.detach()


def milliseconds(optimizer: torch.optim.Optimizer, clock: Callable[[], float]) -> float:
    """Of one step."""
    synchronize()
    start = clock()
    optimizer.step()
    synchronize()
    return (clock() - start) * 1e3


def table(model: str, shapes: Shapes, whole: Shapes, found: dict[str, dict[str, float]], rounds: int) -> str:
    """Fastest first; our ratio to each peer is the last column."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    baseline = BASELINE.get(model, "SGD fused")
    part = "" if len(shapes) == len(whole) else f", the first {len(shapes)} of {len(whole)} tensors, which fit"
    rows = [
        [
            name,
            f"{values['median'] / found[baseline]['median']:.2f}",
            f"{found[OURS]['median'] / values['median']:.2f}",
            f"{values['median']:.2f}",
            f"{values['least']:.2f}",
            f"{values['first']:.0f}",
            f"{values['state'] / numel:.2f}",
            f"{values['extra'] / 1e6:.1f}",
        ]
        for name, values in sorted(found.items(), key=lambda item: item[1]["median"])
    ]
    times = [f"to {baseline}", "SGD-SaI to it", "median ms", "least ms", "first step ms"]
    header = ["optimizer", *times, "state bytes/element", "extra MB"]
    head = f"### {model}: {numel / 1e6:.1f} M parameters{part}; {rounds} rounds"
    return f"{head}\n\n{markdown_table(header, rows)}\n"


def main() -> None:
    """Measures, prints tables, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--before", metavar="FOLDER", help="a checkout of another commit, named as its folder")
    parser.add_argument("--processor-time", action="store_true", help="for a machine that others use meanwhile")
    parser.add_argument("--keep", action="store_true", help="the models of the result file that are not measured now")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = machine("sgd-sai", "pytorch-optimizer")
    name = f"optimizer_step_{device_name()}" + ("" if args.dtype == "float32" else f"_{args.dtype}")
    results: dict[str, Any] = {"machine": about, "dtype": args.dtype, "models": {}}
    if args.keep:
        results["models"] = json.loads((RESULTS / f"{name}.json").read_text())["models"]
    clock = time.process_time if args.processor_time else time.perf_counter
    for model in args.models:
        # In a process of its own: what the model before had allocated does not always go back to the system.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            job = pool.submit(measure, model, args.dtype, args.rounds, args.threads, clock, args.before)
            shapes, found = job.result()
        rounded = {name: {key: round(value, 3) for key, value in values.items()} for name, values in found.items()}
        results["models"][model] = {
            "tensors": len(shapes),
            "of": len(MODELS[model]),
            "rounds": args.rounds,
            "optimizers": rounded,
        }
        print(table(model, shapes, MODELS[model], found, args.rounds), flush=True)
    kept = [(model, results["models"][model]) for model in MODELS if model in results["models"]]
    tables = [
        table(each, MODELS[each][: of["tensors"]], MODELS[each], of["optimizers"], of["rounds"]) for each, of in kept
    ]
    kind = "Processor time" if args.processor_time else "Time"
    title = f"{kind} of one optimizer step, {args.dtype}, medians of rounds, which are interleaved where all states "
    title += "fit into memory. Gradients were "
    title += f'clipped before it, but for "{NOT_CLIPPED}"; the time of clipping is not counted.'
    write_results(name, results, f"{title}\n\n" + "\n".join(tables))


if __name__ == "__main__":
    main()
