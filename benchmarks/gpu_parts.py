"""What benchmarks/gpu.py is made of: tensors of models without the models, optimizers by name, clocks, counters."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import markdown_table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sai.optim import SWAN, SGDSaI


Named = list[tuple[str, nn.Parameter]]

# Width, width of keys and values (0: fused and of full width), inner width, layers, tokens.
SIZES = {
    "gpt2": (768, 0, 3072, 12, 50257),
    "1.5b": (1536, 256, 8960, 28, 151936),
    "8b layers": (4096, 1024, 14336, 4, 0),
    "lora": (4096, 1024, 14336, 32, 0),
}


class Device:
    """
    The device that is tried, and what can be asked of it.

    Args:
        name (`str`): As torch writes it.
        tiny (`bool`): Whether sizes are cut down to what proves only that every line runs.
    """

    def __init__(self, name: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(name), tiny
        self.is_cuda = self.device.type == "cuda"

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes; 0 where nobody counts."""
        return torch.cuda.memory_allocated(self.device) if self.is_cuda else 0

    def peak(self) -> int:
        """The most bytes since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_cuda else 0

    def reset_peak(self) -> None:
        """Begins a new `peak`."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def parameters(self, kind: str, dtype: torch.dtype) -> Named:
        """Named parameters with gradients, of the shapes of a model."""
        found = []
        for name, shape in self._shapes(kind).items():
            param = nn.Parameter((torch.randn(shape, device=self.device) * 0.02).to(dtype))
            param.grad = torch.randn_like(param) * 1e-3
            found.append((name, param))
        return found

    def _shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        w, kv, ff, layers, vocab = SIZES[kind]
        if self.tiny:
            w, kv, ff, layers, vocab = 32, min(kv, 16), 64, 2, min(vocab, 96)
        block: dict[str, tuple[int, ...]]
        if kv:
            block = {"q": (w, w), "k": (kv, w), "v": (kv, w), "o": (w, w)}
            block |= {"gate": (ff, w), "up": (ff, w), "down": (w, ff)}
        else:
            block = {"attn": (3 * w, w), "o": (w, w), "fc": (ff, w), "down": (w, ff)}
            block |= {f"{name}.bias": shape[:1] for name, shape in list(block.items())}
        if kind == "lora":
            rank = 4 if self.tiny else 16
            factors = [(n, s) for n, (out, fan_in) in block.items() for s in ((rank, fan_in), (out, rank))]
            block = {f"{n}.lora_{'AB'[i % 2]}": s for i, (n, s) in enumerate(factors)}
        else:
            block |= {"norm1": (w,), "norm2": (w,)}
        shapes = {f"h.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
        return shapes | ({"embed": (vocab, w)} if vocab else {})


def twins(named: Named) -> Named:
    """Copies of parameters and gradients."""
    found = []
    for name, param in named:
        twin = nn.Parameter(param.detach().clone())
        twin.grad = None if param.grad is None else param.grad.clone()
        found.append((name, twin))
    return found


def swan(named: Named, **options: Any) -> SWAN:
    """SWAN, tables and vectors to Adam."""
    groups = []
    for kind in ("swan", "adam"):
        params = [(n, p) for n, p in named if (p.ndim == 2 and "embed" not in n) == (kind == "swan")]
        groups += [{"params": params, "kind": kind}] if params else []
    return SWAN(groups, lr=1e-3, weight_decay=0.1, **options)


def with_tensor_rate(named: Named) -> SGDSaI:
    """SGD-SaI with its learning rate on the device."""
    return SGDSaI(named, lr=torch.tensor(1e-2, device=named[0][1].device))


NOT_CLIPPED = "sgd_sai not clipped"
MAKERS: dict[str, Callable[[Named], torch.optim.Optimizer]] = {
    "torch sgd fused": lambda n: torch.optim.SGD(
        [p for _, p in n], lr=1e-2, momentum=0.9, weight_decay=0.01, fused=True
    ),
    "torch adamw fused": lambda n: torch.optim.AdamW([p for _, p in n], lr=1e-3, fused=True),
    "sgd_sai": lambda n: SGDSaI(n, lr=1e-2),
    NOT_CLIPPED: lambda n: SGDSaI(n, lr=1e-2),
    "sgd_sai no kernel": lambda n: SGDSaI(n, lr=1e-2, fused=False),
    "sgd_sai per tensor": lambda n: SGDSaI(n, lr=1e-2, foreach=False),
    "sgd_sai stochastic": lambda n: SGDSaI(n, lr=1e-2, stochastic_rounding=True),
    "sgd_sai kahan": lambda n: SGDSaI(n, lr=1e-2, kahan_sum=True),
    "sgd_sai lr tensor": with_tensor_rate,
    "sgd_sai paired": lambda n: SGDSaI([{"params": n, "paired": True}], lr=1e-3),
    "swan": swan,
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    MAKERS["torch muon"] = lambda n: torch.optim.Muon(
        [p for name, p in n if p.ndim == 2 and "embed" not in name], lr=1e-3
    )


class Checks:
    """What was checked, with its facts; printed as it comes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, ok: bool, **facts: Any) -> None:
        """One result."""
        self.rows.append({"check": name, "ok": bool(ok), **facts})
        print("ok    " if ok else "FAILED", name, facts, flush=True)

    def attempt(self, name: str, function: Callable[..., tuple[bool, dict[str, Any]]], *args: Any) -> None:
        """What a function says of itself; an exception is a failure with its place."""
        try:
            ok, facts = function(*args)
        except Exception as error:
            where = traceback.format_exc()[-400:]
            ok, facts = False, {"error": f"{type(error).__name__}: {str(error)[:300]}", "where": where}
        self.add(name, ok, **facts)

    @property
    def failed(self) -> list[str]:
        """Names of what failed."""
        return [row["check"] for row in self.rows if not row["ok"]]


class _Reads(TorchDispatchMode):
    """Counts what would make the host wait, where no CUDA says so; blind to copies."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        self.count += func in waiting
        return func(*args, **(kwargs or {}))


def waits(where: Device, function: Callable[[], Any], mode: str = "warn") -> int:
    """How often the host waited for the device; with `mode="error"` the first time is an exception that says where."""
    if not where.is_cuda:
        with _Reads() as reads:
            function()
        return reads.count
    with warnings.catch_warnings(record=True) as caught, _sync_debug(mode):
        warnings.simplefilter("always")
        function()
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@contextlib.contextmanager
def _sync_debug(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def clock(where: Device, step: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median milliseconds of a step, of the host's part of it, and the most bytes that it needs besides."""
    for _ in range(1 if where.tiny else 3):
        step()
    where.synchronize()
    before, host, whole = where.allocated(), [], []
    where.reset_peak()
    for _ in range(1 if where.tiny else repeats):
        begun = time.perf_counter()
        step()
        host.append((time.perf_counter() - begun) * 1e3)
        where.synchronize()
        whole.append((time.perf_counter() - begun) * 1e3)
    extra = where.peak() - before if where.is_cuda else 0
    return {"ms": statistics.median(whole), "host_ms": statistics.median(host), "extra_bytes": extra}


def launches(where: Device, step: Callable[[], Any]) -> int:
    """Kernel launches of one step, as the profiler saw them; 0 without CUDA."""
    with torch.profiler.profile() as profiled:
        step()
        where.synchronize()
    return sum(event.count for event in profiled.key_averages() if "LaunchKernel" in event.key)


def saved_and_mapped(optimizer: torch.optim.Optimizer) -> Any:
    """The state as the Trainer loads it on one card: written to a file, mapped to the CPU."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)


def state_devices(optimizer: torch.optim.Optimizer) -> list[str]:
    """Where the tensors of the state are."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sorted({str(value.device) for value in values if isinstance(value, Tensor)})


def worst_relative(named: Sequence[tuple[str, Tensor]], others: Sequence[tuple[str, Tensor]]) -> float:
    """The largest difference, relative to the largest element of each tensor."""
    pairs = zip(named, others, strict=True)
    return max(((p - q).abs().max() / q.abs().max().clamp(min=1e-30)).item() for (_, p), (_, q) in pairs)


def llama(tiny: bool, dtype: torch.dtype) -> Any:
    """A LLaMA of random weights, 370 M, or as small as can be."""
    import transformers

    torch.manual_seed(0)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = zip(names, (32, 64, 2, 4, 128) if tiny else (1024, 2816, 24, 16, 32000), strict=True)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**dict(sizes))).to(dtype)


def tables(checks: Checks, speeds: dict[str, dict[str, Any]]) -> str:
    """The checks in a line each, and the times."""
    rows = [["ok" if row["ok"] else "FAILED", row["check"]] for row in checks.rows]
    parts = [markdown_table(["", "check"], rows)]
    header = ["optimizer", "over fused SGD", "ms", "host ms", "first step ms", "launches", "extra MB"]
    for title, found in speeds.items():
        cells = [
            [name, row["over_fused_sgd"], row["ms"], row["host_ms"], row["first_ms"], row["launches"]]
            + [round(row["extra_bytes"] / 1e6, 1)]
            for name, row in found.items()
            if row.get("over_fused_sgd") is not None
        ]
        parts.append(f"### {title}\n\n{markdown_table(header, cells)}")
    return "\n\n".join(parts)
