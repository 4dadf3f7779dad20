"""What hosts write into a card that is not so, or tells a path of this machine: put right where a host wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .header import MODEL_INDEX, Header


LOCAL_MODEL, LOCAL_DATA, LOCAL_PATH = "a local model", "a local dataset", "a local path"
# Of transformers' Trainer; the second line of it holds `optim_args` as they were typed.
_OPTIMIZER = re.compile(r"^- optimizer: Use [^\r\n]*?(?: and the args are:\r?\n[^\r\n]*)?(?=\r?$)", re.MULTILINE)
# The way of all hosts to name a model or a data set: it links to itself.
_LINK = re.compile(r"\[(?P<id>[^\r\n]{0,500}?)\]\(https://huggingface\.co/(?P<data>datasets/)?(?P=id)\)")
_NO_DATA = re.compile(r"\bon the None dataset\b")
_DATA_TWICE = re.compile(r"\bthe (a local|an unnamed) (?:dataset|path) dataset\b")
_SCALES = re.compile(r"(?<=\bgsnr=)[^\s,;`\"')|]+")
_PATH = re.compile(
    r"(?<![\w/.<\\~-])(?:file:///?|~?/|[A-Za-z]:[\\/]|\\\\(?=[\w.-]+\\))(?=[\w.@+~-])[^\s\"'`<>()\[\]{}|,;*]+"
)


def is_repo_id(name: Any) -> bool:
    """Whether it can be a repository, and is not a file or folder here."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return isinstance(name, str) and not Path(name).exists()


def without_paths(text: str, instead: str = LOCAL_PATH) -> str:
    """Absolute paths replaced; a word that only begins with a slash is one where it is there."""

    def replaced(found: re.Match[str]) -> str:
        path = found[0].rstrip(".:!?")
        known = len(re.findall(r"[\\/]+[^\\/]", path)) > 1 or not path.startswith("/") or Path(path).exists()
        return instead + found[0][len(path) :] if known else found[0]

    return _PATH.sub(replaced, text)


def without_local_links(text: str) -> str:
    """Links to a model or a data set that is a folder here, or that has no name on the Hub, in words."""

    def replaced(found: re.Match[str]) -> str:
        if is_repo_id(found["id"]) and found["id"] != "None":  # TRL writes that for a folder
            return found[0]
        return LOCAL_DATA if found["data"] else LOCAL_MODEL

    return _LINK.sub(replaced, text)


def corrected_text(text: str, optimizer: str, local: Mapping[str, str]) -> str:
    """
    The text that a host generated, without our section, put right: `optimizer` says in one line what ran, for the host
    knows our optimizers by name only; `local` is from [`local_names`].
    """
    text = _OPTIMIZER.sub(lambda _: f"- optimizer: {optimizer}", text)
    text = _NO_DATA.sub("on an unnamed dataset", text)
    text = without_local_links(text)
    for name, word in local.items():
        if "/" in name or "\\" in name:  # another one may be a word of the text
            text = re.sub(rf"(?<![\w/.]){re.escape(name)}(?![\w/\\-]|\.\w)", word, text)
    text = _SCALES.sub(lambda found: found[0] if is_repo_id(found[0]) else LOCAL_PATH, text)
    return _DATA_TWICE.sub(r"\1 dataset", without_paths(text))


def local_names(header: Header) -> dict[str, str]:
    """Values of `base_model` and `datasets` that are no repositories, and what is said instead."""
    words = {"base_model": LOCAL_MODEL, "datasets": LOCAL_DATA}
    values = [(each, word) for key, word in words.items() for each in as_list(header.data.get(key))]
    return {each: word for each, word in values if isinstance(each, str) and not is_repo_id(each)}


def drop_local_models(header: Header) -> None:
    """Takes out what names a base model that is no repository: the Hub refuses it, and it may be a path."""
    header.drop("base_model", lambda model: not is_repo_id(model))
    header.drop("tags", _is_local_tag)


def correct_header(header: Header, local: Mapping[str, str]) -> None:
    """Takes paths, names as from [`local_names`], and data sets without one out of a header that a host generated."""
    header.drop("datasets", lambda name: not is_repo_id(name))
    header.rewrite(
        lambda place, value: "local" if isinstance(value, str) and value in local else _corrected_value(place, value)
    )


def as_list(value: Any) -> list[Any]:
    """A list as it is, one value as a list."""
    return value if isinstance(value, list) else [value]


def _is_local_tag(tag: Any) -> bool:
    """PEFT writes `base_model:adapter:<name>`; with a folder for a name that is no tag."""
    if not isinstance(tag, str) or not tag.startswith("base_model:"):
        return False
    parts = tag.split(":", 2)
    kinds = ("adapter", "finetune", "merge", "quantized")
    return not is_repo_id(parts[2] if len(parts) == 3 and parts[1] in kinds else tag.split(":", 1)[1])


def _corrected_value(place: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value, "local")
    if value is None and place[0] == MODEL_INDEX and place[-2:] in (("dataset", "name"), ("dataset", "type")):
        return "unknown"  # the Hub wants a text
    return value
