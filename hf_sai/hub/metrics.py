"""Metrics of a run: `compute_metrics` for the Trainer, and the results where the Hub reads them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from torch import Tensor

from .card import write_results as write_results
from .host_lines import is_repo_id
from .results import as_number, measures, plain


TASKS = ("classification", "token_classification", "causal_lm", "generation")
IGNORED_LABEL = -100
PREFIX = "eval_"


class MetricError(ValueError):
    """Metrics were asked for in a way that can't work."""


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).sum()


# What is summed over the labels that count, and what is made of the mean. (exp(710) is no float any more.)
OWN: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float], float]]] = {
    "perplexity": (_losses, lambda mean: math.exp(mean) if mean < 700 else math.inf),
    "token_accuracy": (_hits, float),
}


class _Own:
    """One of [`OWN`], with the interface of an `evaluate` module; from logits `(labels, classes)`."""

    def __init__(self, name: str) -> None:
        self.name, self.sum, self.count = name, 0.0, 0

    def add_batch(self, predictions: Tensor, references: Tensor) -> None:
        self.sum += OWN[self.name][0](predictions, references).item()
        self.count += references.numel()

    def compute(self) -> dict[str, float]:
        """The result over all batches, and a new start."""
        mean = self.sum / self.count if self.count else math.nan
        self.sum, self.count = 0.0, 0
        return {self.name: OWN[self.name][1](mean)}


class ComputeMetrics:
    """
    A `compute_metrics` for the Trainer.

    With `TrainingArguments(batch_eval_metrics=True)` it takes one batch after the other, so that the logits of a whole
    evaluation, which for a language model are far larger than the model, never stand in memory together.

    Args:
        names (sequence of `str`): `"perplexity"` and `"token_accuracy"`, which need no other package; else names or
            paths of `evaluate` modules, such as `"accuracy"`, `"bleu"`, `"rouge"` or `"./my_metric.py"`.
        task (`str`, *optional*, defaults to `"classification"`): What predictions and labels are.
            `"classification"`: logits and a class per row. `"token_classification"`: logits and a class per position.
            `"causal_lm"`: the same, where a position's logits are about the next position's label. `"generation"`:
            token ids (`predict_with_generate=True`), which are compared as text. Labels of -100 don't count.
        tokenizer (*optional*): For `"generation"`.
        options (mapping, *optional*): Arguments of a module's `compute`, by its name:
            `{"f1": {"average": "macro"}}`.

    Raises:
        `MetricError`: A name, a task or the tokenizer does not fit the others.

    Example:

    ```python
    compute_metrics = ComputeMetrics(["perplexity", "token_accuracy"], task="causal_lm")
    trainer = SaITrainer(model, args, eval_dataset=data, compute_metrics=compute_metrics)
    ```
    """

    def __init__(
        self,
        names: Sequence[str],
        task: str = "classification",
        tokenizer: Any | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if task not in TASKS:
            raise MetricError(f"task must be one of {', '.join(TASKS)} but is {task!r}")
        if task == "generation" and tokenizer is None:
            raise MetricError("task='generation' compares text and needs a tokenizer; pass tokenizer=...")
        own = [name for name in names if name in OWN]
        if task == "generation" and own:
            raise MetricError(f"{own[0]} needs logits, but task='generation' gives token ids; take another task")
        odd = sorted(set(options or {}) - set(names))
        if odd:
            raise MetricError(f"options are for names that are asked for, but {odd[0]!r} is not among them")
        self.task, self.tokenizer = task, tokenizer
        self.options = {name: dict((options or {}).get(name, {})) for name in names}
        self._modules: dict[str, Any] = {name: _Own(name) if name in OWN else _load(name) for name in names}

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """
        Takes a batch, or all of an evaluation; gives the numbers of the modules after the last batch, and nothing
        before.
        """
        predictions, labels = prediction.predictions, prediction.label_ids
        predictions = predictions[0] if isinstance(predictions, (tuple, list)) else predictions
        predictions, labels = torch.as_tensor(predictions).cpu(), torch.as_tensor(labels).cpu()
        if self.task == "generation":
            texts = self._texts(predictions), self._texts(labels)
            for module in self._modules.values():
                module.add_batch(predictions=texts[0], references=texts[1])
        else:
            self._add_logits(predictions, labels)
        if not compute_result:
            return {}
        found: dict[str, float] = {}
        for name, module in self._modules.items():
            results = module.compute(**self.options[name])
            numbers = {key: as_number(value, finite=False) for key, value in results.items()}
            found.update({key: float(value) for key, value in numbers.items() if value is not None})
        return found

    def _add_logits(self, logits: Tensor, labels: Tensor) -> None:
        if logits.ndim != labels.ndim + 1:
            raise MetricError(
                f"task={self.task!r} needs logits of one dimension more than the labels, but they are "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}; check the task, and preprocess_logits_for_metrics"
            )
        if self.task == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        counts = labels != IGNORED_LABEL
        logits, labels = logits[counts], labels[counts]
        if not labels.numel():
            return
        for name, module in self._modules.items():
            if name in OWN:
                module.add_batch(predictions=logits, references=labels)
            else:
                module.add_batch(predictions=logits.argmax(-1).tolist(), references=labels.tolist())

    def _texts(self, ids: Tensor) -> list[str]:
        assert self.tokenizer is not None
        ids = torch.where(ids == IGNORED_LABEL, self.tokenizer.pad_token_id, ids)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _load(name: str) -> Any:
    if importlib.util.find_spec("evaluate") is None:
        raise MetricError(
            f"{name!r} is a metric of the package evaluate, which is not installed; pip install 'hf_sai[evaluate]', "
            f"or take one of {', '.join(OWN)}"
        )
    try:
        return importlib.import_module("evaluate").load(name, keep_in_memory=True)
    except FileNotFoundError as error:
        reason = str(error).strip().splitlines()[0]
        raise MetricError(f"a metric must be {', '.join(OWN)}, a name or a path of evaluate, but: {reason}") from None


def card_results(
    metrics: Mapping[str, Any],
    *,
    task_type: str,
    dataset_type: str,
    dataset_name: str,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    dataset_revision: str | None = None,
) -> list[EvalResult]:
    """
    Metrics as the header of a card holds them (`model-index`).

    Args:
        metrics (mapping): What `trainer.evaluate()` gives: numbers of Python, NumPy or torch. Times, speeds, counts
            and the epoch are left out, and so is what is no finite number, with a warning.
        task_type (`str`): As the Hub names it, such as `"text-generation"`.
        dataset_type (`str`): The data set's id, such as `"stanfordnlp/imdb"`.
        dataset_name (`str`): The data set's name for people.
        dataset_config (`str`, *optional*): Its configuration.
        dataset_split (`str`, *optional*): Its split, such as `"test"`.
        dataset_revision (`str`, *optional*): Its commit.

    Returns:
        `list[huggingface_hub.EvalResult]`: For `trainer.push_to_hub(results=...)` or [`write_results`].
    """
    return [
        EvalResult(
            task_type=task_type,
            dataset_type=dataset_type,
            dataset_name=dataset_name,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
            dataset_revision=dataset_revision,
            metric_type=name,
            metric_name=name.replace("_", " ").capitalize(),
            metric_value=value,
        )
        for name, value in measures(metrics, PREFIX).items()
    ]


def write_benchmark_results(folder: str | os.PathLike[str], entries: Sequence[EvalResultEntry]) -> list[Path]:
    """
    Writes results of benchmarks that are data sets of the Hub into `.eval_results/`, from where they appear on the
    model's page and on the benchmark's leaderboard.

    Args:
        folder (`str` or path): What will be pushed.
        entries (sequence of `huggingface_hub.EvalResultEntry`): Results; `dataset_id` is a benchmark on the Hub.

    Returns:
        `list[pathlib.Path]`: One file per data set.

    Raises:
        `MetricError`: A data set's id is none, as a local folder's.
    """
    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for entry in entries:
        if "/" not in entry.dataset_id or not is_repo_id(entry.dataset_id):
            raise MetricError(
                f"a benchmark must be a data set of the Hub, user/name, but is {entry.dataset_id!r}; results on other "
                "data go into the card, by card_results"
            )
        by_dataset.setdefault(entry.dataset_id, []).append(dataclasses.replace(entry, value=plain(entry.value)))
    target = Path(folder) / ".eval_results"
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for dataset_id, group in by_dataset.items():
        paths.append(target / f"{dataset_id.replace('/', '__')}.yaml")
        paths[-1].write_text(yaml_dump(eval_result_entries_to_yaml(group), sort_keys=False), encoding="utf-8")
    return paths
