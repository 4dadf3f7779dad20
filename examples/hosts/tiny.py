"""A tiny Llama with random weights, its tokenizer and chats to fine-tune it on, and what a host made of them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import offline


RATES = {"sgd_sai": 1e-2, "swan": 3e-3}
OPTIONS = {("sgd_sai", "lora"): "lora_policy=paired", ("swan", "lora"): "lora_whitening=both"}
STEPS = 20
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<' + message['role'] + '>' + message['content'] + (eos_token if message['role'] == 'assistant' else '') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"""


def write_model(folder: Path) -> Path:
    """Model and tokenizer, of 64 wide layers, two of them."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    tokenizer = offline.byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **tokens)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int = 128) -> Path:
    """Questions and answers as `{"messages": [...]}`, one to a line, and beside them as instruction and output."""
    rows = offline.documentation_chats()["train"].select(range(count))["messages"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    pairs = [{"instruction": row[0]["content"], "input": "", "output": row[1]["content"]} for row in rows]
    path.with_suffix(".json").write_text(json.dumps(pairs))
    return path


def call(command: Sequence[object], folder: Path, **environment: str) -> str:
    """What a command of this Python's environment said; an error with its last lines where it failed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    offline_only = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **offline_only, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {found.returncode}:\n{found.stdout[-6000:]}")
    return found.stdout


def losses(folder: Path) -> tuple[float, float]:
    """Of the first and the last logged step, from the `trainer_state.json` that the run left."""
    found = folder.rglob("trainer_state.json")
    state = json.loads(max(found, key=lambda path: path.stat().st_mtime).read_text())
    logged = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return logged[0], logged[-1]


def weights(folder: Path) -> dict[str, object]:
    """What was saved in a folder: the adapter's tensors, or the model's."""
    from safetensors.torch import load_file

    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def differ(one: Path, other: Path) -> int:
    """How many tensors of two saved models are not equal to the bit."""
    import torch

    first, second = weights(one), weights(other)
    if first.keys() != second.keys():
        raise SystemExit(f"{one} and {other} hold tensors of different names")
    return sum(not torch.equal(first[name], second[name]) for name in first)


def optimizer_of(folder: Path) -> str:
    """Which of ours wrote the optimizer's state in a checkpoint, by what it keeps."""
    import torch

    state = torch.load(folder / "optimizer.pt", weights_only=True)
    keys = set(state["param_groups"][0])
    return "sgd_sai" if "gsnr_max" in keys else "swan" if "routes" in keys else f"another, with {sorted(keys)}"


def say(name: str, end: Path, again: Path | None) -> None:
    """One line on a run: its loss, whose state it kept, and whether a resumed one ended with the same weights."""
    first, last = losses(end)
    ranks = len(list(end.glob("rng_state*.pth")))
    equal = f"{differ(end, again)} of {len(weights(end))} tensors differ once resumed" if again else "not resumed"
    print(
        f"{name}: ranks {ranks}, loss {first:.3f} -> {last:.3f}; state of {optimizer_of(end)}; {equal}",
        flush=True,
    )


@dataclass(frozen=True)
class Run:
    """
    What a host is asked for.

    Args:
        folder (`Path`): Holds `model` and `data`; the run writes below it.
        optim (`str`): A key of `RATES`.
        kind (`str`): `"full"` or `"lora"`.
        processes (`int`): How many the host is to start.
        middle (`Path`, *optional*): The checkpoint to resume.
    """

    folder: Path
    optim: str
    kind: str
    processes: int
    middle: Path | None = None

    @property
    def output(self) -> Path:
        """What it writes to."""
        return self.folder / f"{self.optim}-{self.kind}-{self.processes}{'-again' if self.middle else ''}"

    @property
    def options(self) -> dict[str, object]:
        """What only some runs have, by the names of the Trainer."""
        found: dict[str, object] = {}
        if (self.optim, self.kind) in OPTIONS:
            found["optim_args"] = OPTIONS[self.optim, self.kind]
        if self.middle is not None:
            found["resume_from_checkpoint"] = str(self.middle)
        return found


def run(about: str | None, train: Callable[[Run], None], resumable: Sequence[int] = (1, 2)) -> None:
    """
    Trains by a host with both optimizers, full and LoRA, in one process and in two, and once more from the middle; a
    line on each.

    Args:
        about (`str`): What the program is, for its `--help`.
        train (callable): Trains by the host's own command, under `hf-sai run`.
        resumable (sequence of `int`, *optional*, defaults to `(1, 2)`): With how many processes the host can resume.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write to")
    folder = parser.parse_args().folder.resolve()
    write_model(folder / "model")
    write_chats(folder / "data" / "chats.jsonl")

    def end_of(asked: Run) -> Path:
        shutil.rmtree(asked.output, ignore_errors=True)  # of an earlier time
        train(asked)
        return asked.output / f"checkpoint-{STEPS}"

    for processes, optim, kind in product((1, 2), RATES, ("full", "lora")):
        whole = Run(folder, optim, kind, processes)
        end = end_of(whole)
        half = replace(whole, middle=whole.output / f"checkpoint-{STEPS // 2}")
        say(whole.output.name, end, end_of(half) if processes in resumable else None)
