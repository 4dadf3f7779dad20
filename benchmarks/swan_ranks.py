"""
Time of a SWAN step whose work two or more ranks share, beside one in which each whitens all; each rank has its core.

    python benchmarks/swan_ranks.py                  # the 48 matrices of GPT-2 small, two processes
    python benchmarks/swan_ranks.py --model llama2048

The two take turns, and a step ends when all ranks have made theirs. Writes
`benchmarks/results/swan_ranks_<model>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import machine, markdown_table, write_results
from swan_step import MODELS

from hf_sai import SWAN


def steps_of_a_rank(rank: int, ranks: int, folder: str, model: str, rounds: int) -> None:
    """Measures, and saves the seconds of each round from the first rank."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.manual_seed(0)  # equal weights and gradients, as DDP leaves them
    _, shapes, route = MODELS[model]
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    groups = [{"params": params, "routes": [route] * len(params)}]
    optimizers = {shared: SWAN(groups, lr=1e-6, share_whitening=shared) for shared in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 1):
        for shared, optimizer in optimizers.items():
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            dist.barrier()
            if turn:  # the first prepares
                seconds[shared].append(time.perf_counter() - start)
    if rank == 0:
        torch.save(seconds, f"{folder}/seconds.pt")
    dist.destroy_process_group()


def main() -> None:
    """Measures, prints a table, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", choices=list(MODELS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = (args.ranks, folder, args.model, args.rounds)
        torch.multiprocessing.spawn(steps_of_a_rank, given, nprocs=args.ranks)
        seconds: dict[bool, list[float]] = torch.load(Path(folder) / "seconds.pt")
    each, shared = seconds[False], seconds[True]
    ratio = statistics.median(mine / other for mine, other in zip(shared, each, strict=True))
    rows: list[list[Any]] = [
        [name, f"{statistics.median(values) * 1e3:.0f}", f"{min(values) * 1e3:.0f}", of_all]
        for name, values, of_all in (("each rank whitens all", each, "1.00"), ("shared", shared, f"{ratio:.2f}"))
    ]
    text = (
        f"One SWAN step on {MODELS[args.model][0]}, {args.ranks} processes with a thread each; {args.rounds} "
        f"interleaved rounds.\n\n{markdown_table(['', 'median ms', 'least ms', 'ratio'], rows)}"
    )
    print(text)
    results = {"machine": machine(), "setting": vars(args), "shared": shared, "each": each, "ratio": ratio}
    write_results(f"swan_ranks_{args.model}", results, text)


if __name__ == "__main__":
    main()
