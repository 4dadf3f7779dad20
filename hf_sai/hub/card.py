"""Facts of a report, rendered by a template, inserted into the model card that the host wrote."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..optim.registry import get_record
from ..report import GSNRReport


BEGIN, END = "<!-- hf-sai:begin -->", "<!-- hf-sai:end -->"
# A marker that stands alone in the user's text is not ours to pair up.
_SECTION = re.compile(rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """
    What the section says, as plain values.

    Args:
        version (`str`): Of hf_sai.
        options (`list[tuple[str, str]]`): Every option that ran, with the learning rate and the batch.
        kinds (`list[dict]`): [`GSNRReport.by_kind`].
        routes (`list[dict]`): [`GSNRReport.by_route`].
        template (`str`): Name of the template's file.
        state_size (`str`): Of the optimizer's state, such as `"1.5 MB"`.
        adamw_size (`str`): Of AdamW's for the same tensors.
        ratio_sentence (`str`): How g-SNR compares with the size of the tensors.
        status_sentence (`str`): What is pending or a fallback; empty where nothing is.
    """

    version: str
    options: list[tuple[str, str]]
    kinds: list[dict[str, Any]]
    routes: list[dict[str, Any]]
    template: str
    state_size: str
    adamw_size: str
    ratio_sentence: str
    status_sentence: str


def card_facts(report: GSNRReport) -> CardFacts:
    """The facts of a report."""
    options = [("learning rate (peak)", f"{report.learning_rate:g}"), ("weight decay", f"{report.weight_decay:g}")]
    options += [(name, _shown(value)) for name, value in report.options.items()]
    if "effective_batch_size" in report.run:
        title = "effective batch size" if report.routes else "effective batch size at the measurement"
        options.append((title, str(report.run["effective_batch_size"])))
    ratios = [row.gsnr_over_sqrt_numel for row in report.tensors if row.status != "pending"]
    between = f"between {min(ratios):.3g} and {max(ratios):.3g}" if ratios else "not known yet"
    counts = {status: len(report.by_status(status)) for status in ("fallback", "pending")}
    sentences = {
        "fallback": "Tensors of one element or with a constant gradient, whose scale is sqrt(numel): {}.",
        "pending": "Tensors that never had a gradient to measure, and did not train: {}.",
    }
    return CardFacts(
        version=report.versions.get("hf_sai", ""),
        options=options,
        kinds=report.by_kind(),
        routes=report.by_route(),
        template="swan.md.jinja" if report.routes else "sgd_sai.md.jinja",
        state_size=format_bytes(report.state_bytes),
        adamw_size=format_bytes(report.adamw_state_bytes),
        ratio_sentence=f"mostly the size of the tensor: divided by sqrt(numel) it is {between} here.",
        status_sentence=" ".join(sentences[status].format(count) for status, count in counts.items() if count),
    )


def render_section(facts: CardFacts) -> str:
    """The section as Markdown, markers included."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("model_cards", "."), undefined=jinja2.StrictUndefined, trim_blocks=False
    )
    return environment.get_template(facts.template).render(**dataclasses.asdict(facts))


def insert_section(text: str, section: str) -> str:
    """
    The card's text with the section once: where it stood, else at the end.

    Args:
        text (`str`): Markdown, without the YAML header.
        section (`str`): With its markers.
    """
    if _SECTION.search(text):
        first = _SECTION.sub(lambda _: section, text, count=1)
        start = first.index(section) + len(section)
        return first[:start] + _SECTION.sub("", first[start:])
    return f"{text.rstrip()}\n\n{section}\n"


def update_card(path: Path, report: GSNRReport) -> None:
    """
    Adds our section and tags to a card; all else in it stays.

    A `base_model` that is no repository id (a local folder) is taken out of the header: the Hub refuses it, and it
    would tell the path.

    Args:
        path (`pathlib.Path`): The README.md that the host wrote.
        report (`GSNRReport`): What to show.
    """
    card = ModelCard.load(path)
    card.text = insert_section(card.text, render_section(card_facts(report)))
    record = get_record(report.optimizer)
    ours = ["hf-sai", record.name.replace("_", "-"), f"arxiv:{record.paper}"]
    card.data.tags = _merge(_without_local_models(card.data.tags or []), ours)
    models = card.data.base_model if isinstance(card.data.base_model, list) else [card.data.base_model]
    kept = [model for model in models if model is not None and _is_repo_id(model)]
    for model in models:
        if model is not None and model not in kept:
            card.text = card.text.replace(f"[{model}](https://huggingface.co/{model})", "a local model")
    if kept != models:
        card.data.base_model = kept or None
    card.save(path)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def format_bytes(count: int) -> str:
    """`1_500_000` as `1.5 MB`."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _is_repo_id(name: Any) -> bool:
    """Whether it can be a repository, and is not a folder here."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return not Path(name).exists()


def _without_local_models(tags: Iterable[str]) -> list[str]:
    """PEFT writes `base_model:adapter:<name>`; with a folder for a name that is no tag."""
    return [tag for tag in tags if not tag.startswith("base_model:") or _is_repo_id(tag.split(":")[-1])]


def _merge(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))
