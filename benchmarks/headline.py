"""
The README's table: ours, AdamW, the released SGD-SaI and Muon side by side, out of the other result files.

    python benchmarks/headline.py            # seconds; trains nothing

Reads the JSON files in `benchmarks/results`, and writes `headline.json` and `.md` there. A dash: not measured.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from common import RESULTS, command, machine, markdown_table, write_results

from hf_sai.memory import memory_rows
from hf_sai.model_shapes import named_shapes
from hf_sai.optim.routing import ADAM


SGD_SAI, SWAN, ADAMW, THEIRS, PORT, MUON = COLUMNS = (
    "SGD-SaI",
    "SWAN",
    "AdamW",
    "sgd-sai",
    "pytorch-optimizer",
    "Muon + AdamW",
)
Cells = dict[str, str]


def load(name: str) -> dict[str, Any]:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def state_of_llama() -> Cells:
    """GiB; SGD-SaI's ports and Muon keep one number per element of what they update, AdamW two."""
    model = named_shapes("llama-2-7b")
    state = {row.optimizer: row.state for row in memory_rows(model, ["adamw", "sgd_sai", "swan"])}
    muon = sum(row.count * row.numel * (8 if row.route == ADAM else 4) for row in model.trained)
    per_element = load("optimizer_step_cpu")["models"]["GPT-2 small"]["optimizers"]
    numel = model.parameters
    ports = {
        name: numel * 4 * round(per_element[name]["state"] / per_element["SGD-SaI"]["state"])
        for name in (THEIRS, PORT)
    }
    found = {SGD_SAI: state["sgd_sai"], SWAN: state["swan"], ADAMW: state["adamw"], **ports, MUON: muon}
    return {name: f"{size / 2**30:.1f}" for name, size in found.items()}


def step_of_gpt2() -> Cells:
    """Median time as a ratio to SGD's fused kernel."""
    found = load("optimizer_step_cpu")["models"]["GPT-2 small"]["optimizers"]
    names = {SGD_SAI: "SGD-SaI", ADAMW: "AdamW fused", THEIRS: THEIRS, PORT: PORT}
    return {name: f"{found[theirs]['median'] / found['SGD fused']['median']:.2f}" for name, theirs in names.items()}


def step_of_matrices() -> Cells:
    """Median time as a ratio to Muon's."""
    found = load("swan_step_cpu")["optimizers"]
    names = {SWAN: "SWAN", ADAMW: "AdamW fused", MUON: "torch.optim.Muon"}
    return {name: f"{found[theirs]['median'] / found[names[MUON]]['median']:.2f}" for name, theirs in names.items()}


def language_model(name: str) -> Cells:
    """Mean held-out loss over the seeds, at the best of four learning rates."""
    found = load(name)["results"]
    names = {SGD_SAI: "sgd_sai", SWAN: "swan", ADAMW: "adamw", MUON: "muon"}
    means = {
        ours: statistics.mean(run["final"] for run in found[key]["runs"])
        for ours, key in names.items()
        if key in found
    }
    return {ours: f"{mean:.3f}" for ours, mean in means.items()}


def adapter(rank: int, methods: dict[str, str]) -> Cells:
    """The same of a LoRA adapter, by method."""
    found = load("lora_finetuning")["ranks"][str(rank)]
    return {column: f"{statistics.mean(found[method]['losses']):.3f}" for column, method in methods.items()}


def first_step(case: str) -> Cells:
    """What an implementation did."""
    found = load("first_step")["outcomes"][case]
    names = {SGD_SAI: "hf_sai", ADAMW: "AdamW", THEIRS: THEIRS, PORT: PORT}
    return {column: found[name] for column, name in names.items()}


def main() -> None:
    """Gathers, and writes the result files."""
    of_adapters = {
        SGD_SAI: "SGD-SaI, paired",
        SWAN: "SWAN, b_only",
        ADAMW: "AdamW",
        THEIRS: "SGD-SaI, A frozen (as published)",
    }
    rows = {
        "optimizer state, Llama-2-7B in float32, GiB": state_of_llama(),
        "time of a step, GPT-2 small (fused SGD: 1)": step_of_gpt2(),
        "time of a step, 84 matrices (Muon: 1)": step_of_matrices(),
        "LLaMA of 4 layers from random weights, held-out loss": language_model("lm_pretraining_128x4_400"),
        "LLaMA of 2 layers from random weights, held-out loss": language_model("lm_pretraining_64x2_200"),
        "LoRA r = 4, held-out loss": adapter(4, of_adapters),
        "LoRA r = 16, held-out loss": adapter(16, of_adapters),
        "LoRA factors that train": first_step("LoRA: factors that train in 20 steps"),
        "inf in the first gradient": first_step("inf in the first gradient"),
        "saved, loaded, continued": first_step("saved, loaded, continued"),
    }
    table = markdown_table(
        ["", *COLUMNS], [[title, *(cells.get(name, "-") for name in COLUMNS)] for title, cells in rows.items()]
    )
    print(table)
    write_results(
        "headline", {"machine": machine("transformers"), "command": command(__file__, []), "rows": rows}, table
    )


if __name__ == "__main__":
    main()
