"""Our section of a card: facts of a report, rendered by a template, inserted into a text."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..optim.registry import get_record
from ..report import REPORT_PNG, GSNRReport, format_bytes
from ..report.facts import batch, chosen, explained, rates, ratio_sentence, shown, status_sentence, words_of
from ..report.markdown import escaped
from ..report.quantities import moved_text
from .header import newline_of
from .host_lines import as_list


BEGIN, END = "<!-- hf-sai:begin -->", "<!-- hf-sai:end -->"
# Stands for the repository's name until a push knows it.
THIS_REPO = "your-name/this-repository"
BASE_MODEL = "the-model-that-it-was-trained-on"
# A marker that stands alone in the user's text is not ours to pair up.
SECTION = re.compile(rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What stands beside the card, as far as loading it needs."""

    kind: str = ""  # "transformers", "peft", "diffusers" (a pipeline), "diffusers_lora"; "" for another
    repo_id: str = THIS_REPO  # where it is, or will be
    model_class: str = "AutoModel"  # of transformers, that loads it or its base
    base_model: str = BASE_MODEL  # repository of an adapter's base, or a placeholder
    tokenizer: bool = False  # whether there is one
    picture: bool = True  # whether there is one


def read_artifact(folder: Path, library: str | None, base_models: Sequence[str], repo_id: str | None) -> Artifact:
    """How the model in a card's folder is loaded, from it, the card's `library_name` and the bases that it names."""
    config, adapter = (_read_json(folder / name) for name in ("config.json", "adapter_config.json"))
    kind = library if library in ("transformers", "peft", "diffusers") else ""
    kind = "transformers" if library is None and "architectures" in config else kind
    kind = "peft" if kind == "transformers" and adapter else kind
    if kind == "diffusers" and not (folder / "model_index.json").is_file():
        kind = "diffusers_lora"
    if kind == "peft":
        model_class = _AUTO_CLASSES.get(str(adapter.get("task_type")), "AutoModel")
    else:
        model_class = str((as_list(config.get("architectures") or "AutoModel"))[0])
    return Artifact(
        kind=kind,
        repo_id=repo_id or THIS_REPO,
        model_class=model_class if model_class.isidentifier() else "AutoModel",
        base_model=base_models[0] if base_models else BASE_MODEL,
        tokenizer=(folder / "tokenizer_config.json").is_file(),
        picture=(folder / REPORT_PNG).is_file(),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:  # who loads the model will be told
        content = {}
    return content if isinstance(content, dict) else {}


def card_facts(report: GSNRReport, artifact: Artifact | None = None) -> dict[str, Any]:
    """What the templates say of a report, and of what stands beside it, by the names that they use."""
    artifact = artifact or Artifact()
    kept = report.state_bytes / report.adamw_state_bytes if report.adamw_state_bytes else 1.0
    return {
        "record": get_record(report.optimizer),
        "options": [*rates(report), *((name, shown(value)) for name, value in report.options.items()), *batch(report)],
        "kinds": report.by_kind(),
        "routes": report.by_route(),
        "explanations": explained(
            words_of(report).explanations(report), ("learning rate", "update / weight", "route")
        ),
        "state_size": format_bytes(report.state_bytes),
        "adamw_size": format_bytes(report.adamw_state_bytes),
        "saved": f"{1 - kept:.0%}",
        "ratio_sentence": ratio_sentence(report),
        "status_sentence": status_sentence(report),
        "repeated": _repeated(report, artifact),
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "artifact": artifact,
    }


def _repeated(report: GSNRReport, artifact: Artifact) -> str:
    """The call that makes the same optimizer, with all that was chosen, and the scales of this run if it has any."""
    options = chosen(report)
    if any(option.name == "gsnr" for option in get_record(report.optimizer).options):
        options["gsnr"] = artifact.repo_id
    if artifact.kind in ("diffusers", "diffusers_lora"):
        given = {"lr": report.learning_rate, "weight_decay": report.weight_decay, **options}
        return f"optimizer = hf_sai.create_optimizer({_python(report.optimizer)}, model{_arguments(given)})"
    given = {"optim": report.optimizer, "learning_rate": report.learning_rate}
    if report.weight_decay:
        given["weight_decay"] = report.weight_decay
    clipping = report.run.get("max_grad_norm")
    if isinstance(clipping, int | float) and clipping != 1:
        given["max_grad_norm"] = clipping
    targets = options.pop("target_modules", None)
    if targets is not None:
        given["optim_target_modules"] = targets
    if options:
        given["optim_args"] = ",".join(f"{name}={_as_option(value)}" for name, value in options.items())
    return f'args = TrainingArguments("out"{_arguments(given)})'


def _arguments(given: Mapping[str, Any]) -> str:
    """Keyword arguments of a call, after a first one."""
    texts = {name: _python(value) if isinstance(value, str) else repr(value) for name, value in given.items()}
    return "".join(f", {name}={text}" for name, text in texts.items())


def _as_option(value: Any) -> str:
    """As `optim_args` takes it."""
    if isinstance(value, list):
        return "/".join(map(_as_option, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("model_cards", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=_cell, code=_code, python=_python, moved=moved_text)
    return environment


def render_section(facts: dict[str, Any]) -> str:
    """The section as Markdown, markers included, from [`card_facts`]."""
    names = [f"{facts['record'].ordinary}.md.jinja", "optimizer.md.jinja"]
    return _environment().select_template(names).render(**facts).rstrip("\n")


def insert_section(text: str, section: str, line: str | None = None) -> str:
    """The text of a card with the section once: where it stood, else at the end, after a blank line."""
    line = line or newline_of(text or section)
    section = re.sub(r"\r\n|\r|\n", lambda _: line, section)
    if SECTION.search(text):
        first = SECTION.sub(lambda _: section, text, count=1)
        start = first.index(section) + len(section)
        return first[:start] + SECTION.sub("", first[start:])
    end = re.search(r"(?:\r\n|\r|\n)*\Z", text)
    ends = re.findall(r"\r\n|\r|\n", text[end.start() :]) if end else []
    before = [*ends, line, line][:2]
    return text[: len(text) - len("".join(ends))] + "".join(before) + section + ("".join(ends[2:]) or line)


def _cell(value: Any) -> str:
    """As a cell of a table."""
    return escaped(value) or "-"


def _code(value: Any) -> str:
    """As code in a cell; what code can't hold there is escaped text."""
    text = " ".join(str(value).split())
    return _cell(text) if not text or set(text) & set("`<") else f"`{text}`".replace("|", "\\|")


def _python(value: str) -> str:
    """As a string of Python's, on one line."""
    return json.dumps(value, ensure_ascii=False).replace("<!--", "<\\u0021--")
