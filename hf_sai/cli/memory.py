"""`hf-sai memory`: what a training needs in memory, by optimizer, before anything is downloaded or allocated."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer


if TYPE_CHECKING:
    from ..memory import MemoryRow

# A card is sold in GB and has GiB.
_UNITS = {"": 2**30, "M": 2**20, "MB": 2**20, "MIB": 2**20, "G": 2**30, "GB": 2**30, "GIB": 2**30}
_SHOWN_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def memory(
    model: Annotated[
        str, typer.Argument(help="gpt2-xl, llama-2-7b, llama-3-8b, vit-h-14, ..., a folder, or a Hub repository")
    ],
    optim: Annotated[list[str] | None, typer.Option(help="Optimizer to show; can be repeated. Default: all")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights. Mixed precision (--bf16) keeps them in float32"),
    ] = "float32",
    lora: Annotated[int | None, typer.Option(min=1, help="Rank of adapters on all linear layers")] = None,
    gpu: Annotated[str | None, typer.Option(help="A card, such as 24GB: what fits, and the largest LLaMA")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes, for other programs")] = False,
) -> None:
    """Memory of a training beside its activations: weights, gradients, optimizer state, and what an update needs."""
    import torch

    from ..memory import OPTIMIZERS, PUBLISHED, largest_llamas, memory_rows, meta_model

    try:
        card = None if gpu is None else _card_bytes(gpu)
        built = meta_model(model, getattr(torch, dtype), lora)
        rows = memory_rows(built, optim or list(OPTIMIZERS))
    except (ValueError, OSError) as error:
        typer.echo(f"hf-sai: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(1) from None
    names = [row.optimizer for row in rows]
    largest = {} if card is None else largest_llamas(card, names, getattr(torch, dtype), lora)
    trained = sum(param.numel() for param in built.parameters() if param.requires_grad)
    facts = {
        "model": model,
        "parameters": sum(param.numel() for param in built.parameters()),
        "trained": trained,
        "dtype": dtype,
        "lora": lora,
        "gpu": gpu,
        "card_bytes": card,
    }
    if as_json:
        shown = [{**dataclasses.asdict(row), "total": row.total, **_fit(row, card, largest)} for row in rows]
        typer.echo(json.dumps({**facts, "optimizers": shown}, indent=1))
        return
    _print_table(facts, rows, card, largest)
    if model in PUBLISHED and dtype == "float32" and lora is None and {"sgd_sai", "adamw"} <= set(names):
        typer.echo(_beside_the_paper(PUBLISHED[model], {row.optimizer: row.state for row in rows}))


def _card_bytes(text: str) -> int:
    """
    Bytes of a card.

    Raises:
        `ValueError`: It can't be read.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"--gpu must be a size such as 24GB or 512MB but is {text!r}; write the card's memory")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _beside_the_paper(published: tuple[float, float], state: dict[str, int]) -> str:
    counted = [f"{state[name] / 2**30:.2f} GiB ({state[name] / 1e9:.2f} GB)" for name in ("sgd_sai", "adamw")]
    return (
        f"State as the paper has it (arXiv 2412.11768): SGD-SaI {published[0]:.2f} GB, AdamW {published[1]:.2f}.\n"
        f"Counted here: SGD-SaI {counted[0]}, AdamW {counted[1]}."
    )


def _fit(row: MemoryRow, card: int | None, largest: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Whether a row fits the card, and the largest LLaMA that does; nothing without a card."""
    if card is None:
        return {}
    layers, parameters = largest[row.optimizer]
    return {"fits": row.total <= card, "largest_llama": {"layers": layers, "parameters": parameters}}


def _count(parameters: int) -> str:
    if parameters >= 1e9:
        return f"{parameters / 1e9:.2f} B"
    return f"{parameters / 1e6:.1f} M" if parameters else "none"


def _print_table(
    facts: dict[str, Any], rows: list[MemoryRow], card: int | None, largest: dict[str, tuple[int, int]]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    unit, size = next(each for each in _SHOWN_UNITS if each == _SHOWN_UNITS[-1] or rows[0].total >= each[1])
    adapter = "" if facts["lora"] is None else f", LoRA of rank {facts['lora']}"
    trained = f"{facts['trained'] / 1e6:,.1f} M of {facts['parameters'] / 1e6:,.1f} M parameters train"
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column(unit, no_wrap=True)
    for name in ("weights", "gradients", "state", "update", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    if card is not None:
        table.add_column("fits", justify="right", no_wrap=True)
        table.add_column("largest", justify="right", no_wrap=True)
    for row in rows:
        cells = [row.weights, row.gradients, row.state, row.extra, row.total]
        shown = [row.optimizer + "*" * (not row.made), *(f"{value / size:,.2f}" for value in cells)]
        if card is not None:
            shown += ["yes" if row.total <= card else "no", _count(largest[row.optimizer][1])]
        table.add_row(*shown)
    console = Console(width=80, highlight=False)
    console.print(f"{facts['model']}, {facts['dtype']}{adapter}: {trained}", markup=False)
    console.print(table)
    notes = ["Beside these: activations. update: for a while, in each step, at most."]
    if any(not row.made for row in rows):
        notes.append("* computed from bitsandbytes' documented layout; the others made their state.")
    if card is not None:
        notes.append(f"largest: parameters of a LLaMA of Llama-2's proportions that fits {facts['gpu']}.")
    console.print("\n".join(notes))
