"""
What a step costs in launches and host reads on CUDA, counted without a card, at true shapes.

    python benchmarks/launches.py                     # writes benchmarks/results/launches.json and .md
    python benchmarks/launches.py --before old.json   # with a column from an earlier count

Every call to the device is one launch, but for the multi-tensor calls: torch's `multi_tensor_apply` takes lists in
launches of up to 320 chunks of 2^16 elements and of so many tensors as fit beside the pointers of their lists. The
tensors are on `meta`, which takes the paths of CUDA and no memory. `tests/test_launches.py` holds
the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import command, machine, markdown_table, write_results
from optimizer_step import Shapes, gpt2_shapes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sai.optim import SWAN, SGDSaI, adam_update, finite, gsnr, lora_pairs, rounding, sgd_update, tensors


# From aten/src/ATen/native/cuda/MultiTensorApply.cuh of torch 2.8 to 2.13.
CHUNK, BLOCKS = 65536, 320
TENSORS = (110, 64, 48, 36, 30)  # by the number of lists
TENSORS_WITH_SCALARS = (96, 64, 48, 36, 30)
# No kernel: a new view, memory, or a number for the host.
VIEWS = {
    "view", "_unsafe_view", "detach", "alias", "as_strided", "expand", "permute", "transpose", "t", "select", "slice",
    "split", "split_with_sizes", "unbind", "unsqueeze", "squeeze", "empty", "empty_like", "empty_strided", "new_empty",
    "diagonal", "device", "lift_fresh", "unfold", "new_empty_strided", "_reshape_alias", "numpy_T", "mT",
}  # fmt: skip
READS = {"_local_scalar_dense", "is_nonzero", "equal"}
SUMS = {"_foreach_norm": 1}  # one more launch, which sums up the chunks


def launches_of_lists(sizes: Sequence[int], lists: int, scalars: bool = False) -> int:
    """Launches of one multi-tensor call over `lists` lists of tensors of these sizes."""
    most = (TENSORS_WITH_SCALARS if scalars else TENSORS)[lists - 1]
    launches = tensors = blocks = 0
    for size in sizes:
        if size == 0:
            continue
        tensors += 1
        chunks = math.ceil(size / CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last_of_tensor = chunk == chunks - 1
            if (tensors == most and last_of_tensor) or blocks == BLOCKS:
                launches, blocks = launches + 1, 0
                tensors = 0 if last_of_tensor else 1
    return launches + (blocks > 0)


class Launches(TorchDispatchMode):
    """Counts launches by name (`by_name`), and what the host reads (`reads`)."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.reads = 0

    @property
    def total(self) -> int:
        """Of all names."""
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(t.device.type != "cpu" for t in given) or _made_on_device(name, kwargs)
        if name in READS:
            self.reads += on_device
        elif on_device and name not in VIEWS:
            self.by_name[name] += self._count(name, args)
        if name in ("_fused_sgd_", "_fused_adamw_", "_fused_adam_"):
            return None  # has no fake version everywhere
        if name in ("copy_", "_to_copy") and _to_host(name, args, kwargs):
            if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self.reads += 1
            return args[0].zero_() if name == "copy_" else torch.zeros(args[0].shape, dtype=args[0].dtype)
        if name == "_local_scalar_dense":
            return 1.0
        if name == "is_nonzero":
            return True
        return func(*args, **kwargs)

    def _count(self, name: str, args: Any) -> int:
        if name.startswith(("_foreach_", "_fused_")):
            lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
            made = not name.endswith("_")  # the result is a list, too
            if name.startswith("_fused_"):
                made, lists = False, [each for each in lists if each[0].ndim or len(each) == 1 or len(lists) < 5]
            scalars = any(isinstance(a, (list, tuple)) and a and isinstance(a[0], float) for a in args)
            if not name.startswith("_fused_") and not _fast(lists):
                return len(lists[0])
            depth = len(lists) + (made and name not in SUMS)
            return launches_of_lists([t.numel() for t in lists[0]], depth, scalars) + SUMS.get(name, 0)
        if name in ("cat", "stack"):
            return math.ceil(len(args[0]) / 128)
        return 1


def _fast(lists: list[Any]) -> bool:
    """Whether torch takes these lists in multi-tensor launches: one dtype each, rows of one shape and layout."""
    one_dtype = all(len({tensor.dtype for tensor in each}) == 1 for each in lists)
    return one_dtype and all(len({(t.shape, t.stride()) for t in row}) == 1 for row in zip(*lists, strict=True))


def _to_host(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    if name == "copy_":
        return args[0].device.type == "cpu" and args[1].device.type != "cpu"
    device = kwargs.get("device")
    return args[0].device.type != "cpu" and device is not None and torch.device(device).type == "cpu"


def _made_on_device(name: str, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != "cpu"


@contextlib.contextmanager
def on_meta() -> Iterator[list[int]]:
    """
    Has tensors on `meta` take the paths of CUDA, and gives what the host reads: a size for each read.

    What is read is made up: gradients of mean 0 and deviation 1, and norms of 1.
    """
    reads: list[int] = []

    def fetch(values: Tensor) -> Any:
        reads.append(values.numel())
        return [[1e6, 0.0, 1e6]] * len(values) if values.ndim == 2 else [1.0] * len(values)

    kernels = ("cpu", "cuda", "meta")
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            *[(module, "fetch", fetch) for module in (gsnr, lora_pairs)],
            *[(module, "FUSED_DEVICES", kernels) for module in (tensors, sgd_update, adam_update)],
            (rounding, "_seeded", lambda device, seed: None),
            (finite, "_recorded_event", lambda device: unittest.mock.Mock()),
        ):
            stack.enter_context(unittest.mock.patch.object(module, name, value))
        yield reads


def gpt2() -> Shapes:
    """GPT-2, 124 M."""
    return gpt2_shapes(768, 12)


def llama_8b() -> Shapes:
    """Llama-3-8B: 32 layers, and table and head of 128256 tokens."""
    square, kv = (4096, 4096), (1024, 4096)
    layer = [square, kv, kv, square, (14336, 4096), (14336, 4096), (4096, 14336), (4096,), (4096,)]
    return [(128256, 4096), *layer * 32, (4096,), (128256, 4096)]


def lora_8b(rank: int = 16) -> Shapes:
    """An adapter on the seven matrices of each layer of Llama-3-8B, A and B in turn."""
    sizes = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    return [shape for _ in range(32) for fan_in, out in sizes for shape in ((rank, fan_in), (out, rank))]


MODELS: dict[str, Callable[[], Shapes]] = {
    "GPT-2": gpt2,
    "LoRA r=16 on Llama-3-8B": lora_8b,
    "Llama-3-8B": llama_8b,
}
CLIPPED = "SGD-SaI, after clip_grad_norm_"
OPTIMIZERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "SGD-SaI": lambda p: SGDSaI(p, lr=1e-3),
    CLIPPED: lambda p: SGDSaI(p, lr=1e-3),
    "SGD-SaI, stochastic_rounding": lambda p: SGDSaI(p, lr=1e-3, stochastic_rounding=True),
    "SGD-SaI, kahan_sum": lambda p: SGDSaI(p, lr=1e-3, kahan_sum=True),
    "SGD-SaI, lr a tensor": lambda p: _by_tensor(SGDSaI(p, lr=1e-3)),
    "SGD-SaI, paired": lambda p: SGDSaI([{"params": p, "paired": True}], lr=1e-3),
    "SWAN": lambda p: SWAN(_routed(p), lr=1e-3),
    "torch SGD fused": lambda p: _fused(torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.01)),
}


def _routed(params: list[Any]) -> list[dict[str, Any]]:
    """Tables and vectors to Adam."""
    to_adam = [param.ndim < 2 or param.shape[0] > 50_000 for param in params]
    return [
        {"params": [p for p, adam in zip(params, to_adam, strict=True) if adam == (kind == "adam")], "kind": kind}
        for kind in ("swan", "adam")
        if (kind == "adam") in to_adam
    ]


def _by_tensor(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """With a learning rate on the device, which its constructor would read to check it."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3, device="meta")
    return optimizer


def _fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """As with `fused=True`, which torch refuses on `meta`."""
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    optimizer._need_device_dtype_check_for_fused = False  # type: ignore[attr-defined]
    return optimizer


def count(model: str, optimizer: str, dtype: torch.dtype) -> dict[str, Any]:
    """Launches and host reads of the first step and of a steady one."""
    with on_meta() as reads:
        params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in MODELS[model]()]
        for param in params:
            param.grad = torch.empty_like(param)
        made = OPTIMIZERS[optimizer](params)
        rows = []
        for _ in range(3):
            before = len(reads)
            if optimizer == CLIPPED:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            with Launches() as counted:
                made.step()
            rows.append((counted.total, counted.reads + len(reads) - before, counted))
    (first, first_reads, _), _, (steady, steady_reads, counted) = rows
    return {
        "first": first,
        "steady": steady,
        "first_reads": first_reads,
        "reads": steady_reads,
        "by_name": dict(counted.by_name.most_common()),
    }


def fits(model: str, optimizer: str, dtype: torch.dtype) -> bool:
    """Whether the combination says something."""
    if "paired" in optimizer:
        return "LoRA" in model
    return dtype == torch.bfloat16 or not ("rounding" in optimizer or "kahan" in optimizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Counts, prints a table, writes the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a JSON file of an earlier count, for columns beside")
    parser.add_argument("--name", default="launches", help="of the result files")
    args = parser.parse_args(argv)
    before = json.loads(args.before.read_text())["counts"] if args.before else {}
    found: dict[str, dict[str, Any]] = {}
    rows = []
    for model, dtype, optimizer in itertools.product(MODELS, (torch.float32, torch.bfloat16), OPTIMIZERS):
        if not fits(model, optimizer, dtype):
            continue
        title = f"{model}, {str(dtype).removeprefix('torch.')}, {optimizer}"
        counted = found[title] = count(model, optimizer, dtype)
        earlier = before.get(title, {})
        cells = [model, str(dtype).removeprefix("torch."), optimizer]
        for key in ("steady", "first", "reads", "first_reads"):
            before_it = (
                "" if not earlier else f"{'not counted' if earlier[key] is None else format(earlier[key], ',')} -> "
            )
            cells.append(f"{before_it}{counted[key]:,}")
        rows.append(cells)
        print(*rows[-1])
    header = [
        "model",
        "dtype",
        "optimizer",
        "launches",
        "in the first step",
        "host reads",
        "in the first",
    ]
    text = "Launches of one step on CUDA, counted on `meta` tensors; nothing here ran on a GPU."
    text += " Before `->`: an earlier version." if before else ""
    results = {"machine": machine(), "command": command(__file__, argv), "counts": found, "before": before}
    write_results(args.name, results, f"{text}\n\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    main()
