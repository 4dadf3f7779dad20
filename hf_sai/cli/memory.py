"""`hf-sai memory`: whether a training fits, by optimizer, before anything is downloaded or allocated."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer


if TYPE_CHECKING:
    from ..memory import MemoryRow
    from ..model_shapes import ModelShapes, Training

# A card is sold in GB and has GiB.
_UNITS = {"": 2**30, "M": 2**20, "MB": 2**20, "MIB": 2**20, "G": 2**30, "GB": 2**30, "GIB": 2**30}
_SHOWN_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def memory(
    model: Annotated[
        str, typer.Argument(help="gpt2-xl, llama-2-7b, llama-3-8b, vit-h-14, ..., a folder, or a Hub repository")
    ],
    optim: Annotated[list[str] | None, typer.Option(help="Optimizer to show; can be repeated. Default: all")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights. Default: as from_pretrained loads them. --bf16 of a Trainer: float32"),
    ] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Rank of adapters; all else is frozen")] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Modules of the adapters, q_proj,v_proj; default: all linear layers")
    ] = None,
    quantization: Annotated[
        Literal["none", "nf4", "nf4-double", "int8"] | None,
        typer.Option(help="Of the frozen weights (bitsandbytes). Default: as config.json says"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a device in one forward pass")] = 1,
    sequence: Annotated[int | None, typer.Option(min=1, help="Tokens of each. Default: 1024 or the longest")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Layers are computed again in the backward pass")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="A card, such as 24GB: what fits, and the largest LLaMA")] = None,
    zero: Annotated[int | None, typer.Option(min=1, max=3, help="ZeRO stage; 3 is FSDP's full shard too")] = None,
    gpus: Annotated[int | None, typer.Option(min=2, help="Devices that share, with --zero")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the repository's own Python files")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes, for other programs")] = False,
) -> None:
    """Whether a training fits: weights, gradients, optimizer state, what an update needs, and activations."""
    from ..memory import largest_llamas, memory_rows
    from ..model_shapes import Training

    training = Training(
        dtype, lora, lora_targets or "all-linear", quantization, batch, sequence, gradient_checkpointing
    )
    try:
        if lora_targets is not None and lora is None:
            raise ValueError("--lora-targets needs adapters but --lora is not given; add --lora 16")
        if (zero is None) != (gpus is None):
            raise ValueError("--zero and --gpus belong together but one is missing; give both, as --zero 3 --gpus 8")
        card = None if gpu is None else _card_bytes(gpu)
        shapes = _shapes(model, training, revision, trust_remote_code)
        rows = memory_rows(shapes, optim, zero or 0, gpus or 1)
    except (ValueError, OSError) as error:
        typer.echo(f"hf-sai: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    largest: dict[str, tuple[int, int]] = {}
    if card is not None:
        alike = dataclasses.replace(training, dtype=shapes.dtype, lora_targets="all-linear")
        largest = largest_llamas(card, [row.optimizer for row in rows], alike, zero or 0, gpus or 1)
    facts = {"model": model, "parameters": shapes.parameters, "trained": shapes.trained_parameters}
    facts |= {**dataclasses.asdict(training), "dtype": shapes.dtype, "sequence": shapes.sequence, "note": shapes.note}
    facts |= {"zero": zero, "gpus": gpus, "gpu": gpu, "card_bytes": card}
    if as_json:
        typer.echo(json.dumps({**facts, "optimizers": [_entry(row, card, largest) for row in rows]}, indent=1))
    else:
        typer.echo("\n".join(_lines(facts, rows, card, largest)))


def _shapes(model: str, training: Training, revision: str | None, trust_remote_code: bool) -> ModelShapes:
    """Of a named model from the table, of another from its configuration; refuses an option that would do nothing."""
    from ..model_shapes import named_models, named_shapes

    named, here = model in named_models(), Path(model).exists()
    if revision is not None and (named or here):
        place = "a built-in name" if named else "a file or folder here"
        raise ValueError(f"--revision is of a repository of the Hub, but {model} is {place}; leave it out")
    if not named:
        from ..model_build import shapes_of_source

        return shapes_of_source(model, training, revision, trust_remote_code)
    if trust_remote_code:
        raise ValueError(f"--trust-remote-code would change nothing: {model} is a built-in name; leave it out")
    return named_shapes(model, training)


def _card_bytes(text: str) -> int:
    """Bytes of a card."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"--gpu must be a size such as 24GB or 512MB but is {text!r}; write the card's memory")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _entry(row: MemoryRow, card: int | None, largest: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """A row for other programs; with a card, whether it fits, and the largest LLaMA that does."""
    found = {**dataclasses.asdict(row), "total": row.total, "peak": row.peak}
    if card is not None:
        layers, parameters = largest[row.optimizer]
        found |= {"fits": row.peak <= card, "largest_llama": {"layers": layers, "parameters": parameters}}
    return found


def _count(parameters: int) -> str:
    if parameters >= 1e9:
        return f"{parameters / 1e9:.2f} B"
    return f"{parameters / 1e6:.1f} M" if parameters else "none"


def _lines(
    facts: dict[str, Any], rows: list[MemoryRow], card: int | None, largest: dict[str, tuple[int, int]]
) -> list[str]:
    """The table for a terminal of 80 columns, with what it says above and below."""
    unit, size = next(each for each in _SHOWN_UNITS if each == _SHOWN_UNITS[-1] or rows[0].total >= each[1])
    heads = [unit, "weights", "gradients", "state", "update", "total", "peak"]
    heads += ["fits", "largest"] if card is not None else []
    cells = []
    for row in rows:
        values = [row.weights, row.gradients, row.state, row.extra, row.total, row.peak]
        line = [row.optimizer + "*" * (not row.checked), *(_figure(value / size) for value in values)]
        if card is not None:
            line += ["yes" if row.peak <= card else "no", _count(largest[row.optimizer][1])]
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    head, *table = (
        " ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in [heads, *cells]
    )
    about, notes = _about(facts, rows[0], unit, size), _notes(facts, rows, card)
    return [*about, "", head, "-" * len(head), *table, "", *notes]


def _figure(value: float) -> str:
    """Three digits after the point are more than is known of a large one."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _about(facts: dict[str, Any], row: MemoryRow, unit: str, size: int) -> list[str]:
    """What is trained, and on how much at a time."""
    parts = [facts["dtype"]]
    parts += [facts["quantization"]] if facts["quantization"] not in (None, "none") else []
    parts += [] if facts["lora_rank"] is None else [f"LoRA of rank {facts['lora_rank']}"]
    parts += [] if facts["zero"] is None else [f"ZeRO {facts['zero']} over {facts['gpus']}"]
    trained = f"{facts['trained'] / 1e6:,.1f} M of {facts['parameters'] / 1e6:,.1f} M parameters train"
    examples = f"batch {facts['batch']}" + (f" x {facts['sequence']:,} tokens" if facts["sequence"] else "")
    examples += ", gradient checkpointing" * facts["gradient_checkpointing"]
    kept = "not counted" if row.activations is None else f"{_figure(row.activations / size)} {unit}"
    return [f"{facts['model']}, {', '.join(parts)}: {trained}", f"{examples}: activations {kept}"]


def _notes(facts: dict[str, Any], rows: list[MemoryRow], card: int | None) -> list[str]:
    """How to read the table."""
    import textwrap

    from ..model_shapes import PUBLISHED

    notes = [
        "total: weights, gradients, state and what an update takes for a while. peak: the most of a step, with "
        "activations, which are gone before all gradients are there."
    ]
    if any(not row.checked for row in rows):
        notes.append("* bitsandbytes' documented layout; tests hold the others against the optimizers.")
    if card is not None:
        notes.append(f"largest: parameters of a LLaMA of Llama-2's proportions whose peak fits {facts['gpu']}.")
    notes += [facts["note"]] if facts["note"] else []
    state = {row.optimizer: row.state for row in rows}
    as_published = facts["dtype"] == "float32" and facts["lora_rank"] is None and facts["zero"] is None
    if facts["model"] in PUBLISHED and as_published and {"sgd_sai", "adamw"} <= set(state):
        notes.append(_beside_the_paper(PUBLISHED[facts["model"]], state))
    return [line for note in notes for line in textwrap.wrap(note, 80, break_on_hyphens=False)]


def _beside_the_paper(published: tuple[float, float], state: dict[str, int]) -> str:
    counted = [f"{state[name] / 2**30:.2f} GiB ({state[name] / 1e9:.2f} GB)" for name in ("sgd_sai", "adamw")]
    return (
        f"State as the paper has it (arXiv 2412.11768): SGD-SaI {published[0]:.2f} GB, AdamW {published[1]:.2f}. "
        f"Counted here: SGD-SaI {counted[0]}, AdamW {counted[1]}."
    )
