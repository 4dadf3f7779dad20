"""Facts of a report, rendered by a template, inserted into the model card that the host wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..optim.registry import get_record
from ..report import REPORT_PNG, GSNRReport, format_bytes


logger = logging.getLogger(__name__)

BEGIN, END = "<!-- hf-sai:begin -->", "<!-- hf-sai:end -->"
# Stands for the repository's name until a push knows it.
THIS_REPO = "your-name/this-repository"
BASE_MODEL = "the-model-that-it-was-trained-on"
# A marker that stands alone in the user's text is not ours to pair up.
_SECTION = re.compile(rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
# The digest of what a host generated: as long as it is right, nobody has edited the card.
_STAMP = re.compile(r"<!-- hf-sai:generated ([0-9a-f]{16}) -->\n?")
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """
    What the section says, as plain values.

    Args:
        learning_rate (`str`): The peak.
        options (`list[tuple[str, str]]`): Every option that ran, with the learning rate and the batch.
        kinds (`list[dict]`): [`GSNRReport.by_kind`].
        routes (`list[dict]`): [`GSNRReport.by_route`].
        template (`str`): Name of the template's file.
        state_size (`str`): Of the optimizer's state, such as `"1.5 MB"`.
        adamw_size (`str`): Of AdamW's for the same tensors.
        saved (`str`): The difference, such as `"50%"`.
        ratio_sentence (`str`): How g-SNR compares with the size of the tensors.
        status_sentence (`str`): What is pending or a fallback; empty where nothing is.
        versions (`str`): Of the packages that ran.
        artifact (`Artifact`): How it is loaded.
    """

    learning_rate: str
    options: list[tuple[str, str]]
    kinds: list[dict[str, Any]]
    routes: list[dict[str, Any]]
    template: str
    state_size: str
    adamw_size: str
    saved: str
    ratio_sentence: str
    status_sentence: str
    versions: str
    artifact: Artifact


@dataclasses.dataclass(frozen=True)
class Artifact:
    """
    What stands beside the card, as far as loading it needs.

    Args:
        kind (`str`): `"transformers"`, `"peft"`, `"diffusers"` (a pipeline) or `"diffusers_lora"`; `""` for another.
        repo_id (`str`): Where it is, or will be.
        model_class (`str`): Of transformers, that loads it or its base.
        base_model (`str`): Repository of an adapter's base, or a placeholder.
        tokenizer (`bool`): Whether there is one.
        picture (`bool`): Whether there is one.
    """

    kind: str = ""
    repo_id: str = THIS_REPO
    model_class: str = "AutoModel"
    base_model: str = BASE_MODEL
    tokenizer: bool = False
    picture: bool = True


def read_artifact(folder: Path, library: str | None, base_models: Sequence[str], repo_id: str | None) -> Artifact:
    """
    Reads from a folder how its model is loaded.

    Args:
        folder (`pathlib.Path`): Where the card stands.
        library (`str`, *optional*): The card's `library_name`.
        base_models (`list[str]`): Repositories that the card names.
        repo_id (`str`, *optional*): Where it will be pushed.
    """
    config, adapter = (_read_json(folder / name) for name in ("config.json", "adapter_config.json"))
    kind = library if library in ("transformers", "peft", "diffusers") else ""
    kind = "transformers" if library is None and "architectures" in config else kind
    kind = "peft" if kind == "transformers" and adapter else kind
    if kind == "diffusers" and not (folder / "model_index.json").is_file():
        kind = "diffusers_lora"
    if kind == "peft":
        model_class = _AUTO_CLASSES.get(str(adapter.get("task_type")), "AutoModel")
    else:
        model_class = (config.get("architectures") or ["AutoModel"])[0]
    return Artifact(
        kind=kind,
        repo_id=repo_id or THIS_REPO,
        model_class=model_class,
        base_model=base_models[0] if base_models else BASE_MODEL,
        tokenizer=(folder / "tokenizer_config.json").is_file(),
        picture=(folder / REPORT_PNG).is_file(),
    )


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def card_facts(report: GSNRReport, artifact: Artifact | None = None) -> CardFacts:
    """The facts of a report, and of what stands beside it."""
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
    kept = report.state_bytes / report.adamw_state_bytes if report.adamw_state_bytes else 1.0
    return CardFacts(
        learning_rate=f"{report.learning_rate:g}",
        options=options,
        kinds=report.by_kind(),
        routes=report.by_route(),
        template="swan.md.jinja" if report.routes else "sgd_sai.md.jinja",
        state_size=format_bytes(report.state_bytes),
        adamw_size=format_bytes(report.adamw_state_bytes),
        saved=f"{1 - kept:.0%}",
        ratio_sentence=f"mostly the size of the tensor: divided by sqrt(numel) it is {between} here.",
        status_sentence=" ".join(sentences[status].format(count) for status, count in counts.items() if count),
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
        artifact=artifact or Artifact(),
    )


def render_section(facts: CardFacts) -> str:
    """The section as Markdown, markers included."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("model_cards", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    values = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    return environment.get_template(facts.template).render(**values).rstrip("\n")


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


def update_card(
    path: Path,
    report: GSNRReport,
    *,
    earlier: str | None = None,
    repo_id: str | None = None,
    results: Iterable[EvalResult] = (),
) -> None:
    """
    Adds our section, tags and results to a card; all else in it stays.

    A `base_model` that is no repository id (a local folder) is taken out of the header: the Hub refuses it, and it
    would tell the path. `library_name`, `pipeline_tag` and the like stay what the host or the script wrote.

    Args:
        path (`pathlib.Path`): The README.md that the host, a script or a person wrote. What stands beside it (an
            adapter, a pipeline) decides how the section says that it is loaded.
        report (`GSNRReport`): What to show.
        earlier (`str`, *optional*): Given where a host has just written `path` anew: the card that stood there
            before, or `""`. Where a person had edited that one, it comes back, with our section renewed.
        repo_id (`str`, *optional*): Where it will be pushed; without it a push puts it in.
        results (iterable of `huggingface_hub.EvalResult`, *optional*): For the header; see [`hf_sai.hub.metrics`].
    """
    card = ModelCard.load(path)
    generated = earlier is not None or is_generated(str(card))
    _drop_local_models(card)
    if earlier and not is_generated(earlier):
        card, generated = _with_header_of(ModelCard(earlier), card), False
        _drop_local_models(card)
    record = get_record(report.optimizer)
    card.data.tags = _merge(card.data.tags or [], ["hf-sai", record.name.replace("_", "-"), f"arxiv:{record.paper}"])
    base_models = [each for each in _as_list(card.data.base_model) if isinstance(each, str)]
    artifact = read_artifact(path.parent, card.data.library_name, base_models, repo_id)
    card.text = insert_section(card.text, render_section(card_facts(report, artifact)))
    add_results(card, results, (repo_id or path.absolute().parent.name).split("/")[-1])
    card.text = _STAMP.sub("", card.text)
    if generated:
        _stamp(card)
    card.save(path)


def add_results(card: ModelCard, results: Iterable[EvalResult], model_name: str) -> None:
    """
    Puts results into the header, where the Hub reads them (`model-index`); the same measurement is replaced.

    Args:
        card (`huggingface_hub.ModelCard`): The card.
        results (iterable of `huggingface_hub.EvalResult`): Results; nothing is changed where there are none.
        model_name (`str`): For a card that has no results yet.
    """
    new = list(results)
    if not new:
        return
    kept = [old for old in card.data.eval_results or [] if not any(old.is_equal_except_value(each) for each in new)]
    card.data.eval_results = [*kept, *new]
    card.data.model_name = card.data.model_name or model_name


def mark_generated(path: Path) -> None:
    """Notes in a card that a host has just generated it, so that an edit by a person can be told from it later."""
    card = ModelCard.load(path)
    if _STAMP.search(card.text) is None:
        _stamp(card)
        card.save(path)


def is_generated(content: str) -> bool:
    """Whether a card is, but for our section, as a host generated it: no person has edited it."""
    card = ModelCard(content)
    stamp = _STAMP.search(card.text)
    return stamp is not None and stamp[1] == _digest(card)


def merge_cards(ours: str, theirs: str) -> str:
    """
    The card to push over one that is on the Hub.

    Where people have edited the one on the Hub and nobody has edited ours, it is theirs with our section and tags,
    and with the fields that its header lacks; else it is ours.

    Args:
        ours (`str`): The card here.
        theirs (`str`): The card on the Hub.
    """
    if ours == theirs or is_generated(theirs):
        return ours
    if not is_generated(ours):
        if _plain(ours) != _plain(theirs):
            logger.warning("The card here and the one on the Hub were both edited: pushing the one here.")
        return ours
    mine, card = ModelCard(ours), ModelCard(theirs)
    card = _with_header_of(card, mine)
    section = _SECTION.search(mine.text)
    if section is not None:
        card.text = insert_section(card.text, section[0])
    return str(card)


def name_repository(content: str, repo_id: str) -> str:
    """The card with the repository's name in our section's examples."""
    return _SECTION.sub(lambda section: section[0].replace(THIS_REPO, repo_id), content)


def _with_header_of(card: ModelCard, other: ModelCard) -> ModelCard:
    """A person's card, with fields and tags of another where it has none."""
    for key, value in other.data.to_dict().items():
        if key != "model-index" and card.data.get(key) is None:
            card.data[key] = value
    card.data.tags = _merge(card.data.tags or [], other.data.tags or []) or None
    add_results(card, other.data.eval_results or (), other.data.model_name or "")
    card.text = _STAMP.sub("", card.text)
    return card


def _plain(content: str) -> tuple[str, str]:
    """Header and text without our section."""
    card = ModelCard(content)
    text = _STAMP.sub("", _SECTION.sub("", card.text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return json.dumps(card.data.to_dict(), sort_keys=True, default=str), "\n".join(lines)


def _digest(card: ModelCard) -> str:
    return hashlib.sha256("\n".join(_plain(str(card))).encode()).hexdigest()[:16]


def _stamp(card: ModelCard) -> None:
    card.text = _STAMP.sub("", card.text)
    card.text = f"{card.text.rstrip()}\n\n<!-- hf-sai:generated {_digest(card)} -->\n"


def _drop_local_models(card: ModelCard) -> None:
    card.data.tags = _without_local_models(card.data.tags or []) or None
    models = _as_list(card.data.base_model)
    kept = [model for model in models if _is_repo_id(model)]
    for model in models:
        if model is not None and model not in kept:
            card.text = card.text.replace(f"[{model}](https://huggingface.co/{model})", "a local model")
    if kept != models:
        card.data.base_model = kept or None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _is_repo_id(name: Any) -> bool:
    """Whether it can be a repository, and is not a folder here."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return isinstance(name, str) and not Path(name).exists()


def _without_local_models(tags: Iterable[str]) -> list[str]:
    """PEFT writes `base_model:adapter:<name>`; with a folder for a name that is no tag."""
    return [tag for tag in tags if not tag.startswith("base_model:") or _is_repo_id(tag.split(":")[-1])]


def _merge(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))
