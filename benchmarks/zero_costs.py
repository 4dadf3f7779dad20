"""
What DeepSpeed ZeRO costs with each optimizer, computed: bytes on a GPU, and what optimizers send besides DeepSpeed.

    python benchmarks/zero_costs.py

prints the table of docs/processes.md. bf16 weights and gradients, float32 masters; no activations, no buffers of
DeepSpeed's own.
"""

from __future__ import annotations

from dataclasses import dataclass


GB = 1e9
# float64 count, mean and sum of squared deviations per tensor
BYTES_PER_ROW = 3 * 8
# SWAN's bound on a GPU: 1 GiB at 32 bytes an element
ELEMENTS_AT_ONCE = 2**30 // 32


@dataclass(frozen=True)
class Llama:
    """The shapes of a Llama-3."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int = 128_256
    groups: int = 8

    def matrices(self) -> list[tuple[int, int]]:
        """Of the blocks."""
        narrow = self.width // self.heads * self.groups
        layer = [(self.width, self.width)] * 2 + [(narrow, self.width)] * 2
        layer += [(self.inner, self.width)] * 2 + [(self.width, self.inner)]
        return layer * self.layers

    def rest(self) -> list[int]:
        """Elements of embedding, head and norms."""
        return [self.vocabulary * self.width] * 2 + [self.width] * (2 * self.layers + 1)


MODELS = (Llama("8B", 4096, 14336, 32, 32), Llama("70B", 8192, 28672, 80, 64))


def bytes_on_a_gpu(model: Llama, stage: int, gpus: int, optimizer: str) -> float:
    """Weights, gradients, masters and state."""
    whitened = sum(rows * columns for rows, columns in model.matrices())
    elements = whitened + sum(model.rest())
    kept = {"AdamW": 8 * elements, "SGD-SaI": 4 * elements, "SWAN": 8 * sum(model.rest())}[optimizer]
    weights = 2 * elements / (gpus if stage == 3 else 1)
    gradients = 2 * elements / (gpus if stage >= 2 else 1)
    return weights + gradients + (4 * elements + kept) / (gpus if stage else 1)


def measured_bytes(model: Llama) -> int:
    """That each rank hands to the one all_gather of a step of SGD-SaI that measures all tensors."""
    return BYTES_PER_ROW * (len(model.matrices()) + len(model.rest()))


def exchanged(model: Llama, gpus: int) -> tuple[int, float]:
    """all_to_all calls of a step of SWAN, and bytes that a rank sends in them."""
    by_shape: dict[tuple[int, int], int] = {}
    for shape in model.matrices():
        by_shape[shape] = by_shape.get(shape, 0) + 1
    calls = 0
    for (rows, columns), count in by_shape.items():
        at_once = max(1, ELEMENTS_AT_ONCE // (rows * columns)) * gpus
        calls += 2 * -(-count // at_once)
    whitened = sum(rows * columns for rows, columns in model.matrices())
    return calls, 2 * 4 * whitened / gpus * (gpus - 1) / gpus


def table() -> str:
    """Markdown."""
    names = [
        "model",
        "GPUs",
        "stage",
        "AdamW",
        "SGD-SaI",
        "SWAN",
        "SGD-SaI sends, first step",
        "SWAN sends, every step",
    ]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for model in MODELS:
        for gpus in (8, 64):
            calls, sent = exchanged(model, gpus)
            for stage in (1, 2, 3):
                sizes = [
                    f"{bytes_on_a_gpu(model, stage, gpus, name) / GB:.1f}" for name in ("AdamW", "SGD-SaI", "SWAN")
                ]
                first = f"{measured_bytes(model) / 1e3:.1f} kB, 1 call"
                every = f"{sent / GB:.1f} GB, {calls} calls"
                lines.append(f"| {model.name} | {gpus} | {stage} | {' | '.join(sizes)} | {first} | {every} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
