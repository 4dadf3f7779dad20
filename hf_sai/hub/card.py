"""Model cards of hosts and of persons: our fields and our section go in, and every other byte of a person's stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..files import warning_instead, write_whole
from ..optim.registry import get_record
from ..report import GSNRReport
from ..report.facts import shown
from .header import MODEL_INDEX, Header, HeaderError, header_of, join_card, newline_of, split_card
from .host_lines import as_list, correct_header, corrected_text, drop_local_models, local_names, without_local_links
from .results import plain_results
from .section import BEGIN, SECTION, THIS_REPO, card_facts, insert_section, read_artifact, render_section


logger = logging.getLogger(__name__)

# The digest of what a host generated: as long as it is right, nobody has edited the card.
_STAMP = re.compile(r"<!-- hf-sai:generated ([0-9a-f]{16}) -->(?:\r\n|\r|\n)?")
_STAMP_START = b"<!-- hf-sai:generated "
LARGEST = 2**21  # bytes of a card that is looked through
# Of the comment at the head of what transformers and diffusers generate; who has proofread a card takes it out.
_NOT_PROOFREAD = "This model card has been generated automatically"
_FORM = b"[More Information Needed]"


class CardError(ValueError):
    """A card can't be read."""


def update_card(
    path: Path,
    report: GSNRReport,
    *,
    earlier: str | None = None,
    repo_id: str | None = None,
    results: Iterable[EvalResult] = (),
) -> None:
    """
    Adds our section, tags and results to a card; all else in it stays, byte for byte.

    A `base_model` that is no repository id (a local folder) is taken out of the header: the Hub refuses it, and it
    would tell the path. `library_name`, `pipeline_tag` and the like stay what the host or the script wrote. In a card
    that a host generated, the line about the optimizer, data sets without a name and local paths are put right too.

    A card that can't be read is left as it is, with a warning.

    Args:
        path (`pathlib.Path`): The README.md that the host, a script or a person wrote. What stands beside it (an
            adapter, a pipeline) decides how the section says that it is loaded.
        report (`GSNRReport`): What to show.
        earlier (`str`, *optional*): Given where a host has just written `path` anew: the card that stood there
            before, or `""`. Where a person had edited that one, it comes back, with our section renewed.
        repo_id (`str`, *optional*): Where it will be pushed; without it a push puts it in.
        results (iterable of `huggingface_hub.EvalResult`, *optional*): For the header; see [`hf_sai.hub.metrics`].
    """
    content = read_card(path)
    if content is None:
        if earlier:
            logger.warning("The host wrote it so: the card that stood there before is back.")
            write_whole(path, earlier.encode("utf-8"))
        return
    untouched = BEGIN not in content and _STAMP.search(content) is None
    generated = earlier is not None or is_generated(content) or (untouched and _NOT_PROOFREAD in content)
    if generated:
        content = _put_right(content, report)
    elif untouched:
        content = without_local_links(content)
    if earlier and not is_generated(earlier):
        content, generated = _with_header_of(earlier, content, str(path)), False
    record = get_record(report.optimizer)
    tags = ["hf-sai", record.name.replace("_", "-"), f"arxiv:{record.paper}"]
    found = plain_results(results)

    def edit(header: Header) -> None:
        drop_local_models(header)
        header.extend("tags", tags)
        header.add_results(found, (repo_id or path.absolute().parent.name).split("/")[-1])

    content = _edited(content, edit, str(path))
    data = _loaded(content).data
    base_models = [each for each in as_list(data.base_model) if isinstance(each, str)]
    artifact = read_artifact(path.parent, data.library_name, base_models, repo_id)
    content = _with_section(content, render_section(card_facts(report, artifact)))
    save_card(path, _stamped(content) if generated else content)


def finish_card(path: Path, repo_id: str | None, report: GSNRReport) -> None:
    """As [`update_card`] with a card that a model has just written of itself, with the report and its picture beside
    it; what fails is a warning."""
    with warning_instead(logger, f"{path} has no section about the optimizer; the model is not concerned."):
        report.save(path.parent)
        update_card(path, report, earlier="", repo_id=repo_id)


def write_results(card: str | os.PathLike[str], results: Iterable[EvalResult]) -> None:
    """
    Puts results into the header of a card that is there; those of the same measurement are replaced.

    The card then counts as edited: a later training renews our section in it and no other text. A card that is to be
    written anew takes its results from `trainer.push_to_hub(results=...)`. All else in the card stays, byte for byte;
    a card that can't be read, or whose results can't be changed safely, is left as it is, with a warning.

    Args:
        card (`str` or path): The README.md.
        results (iterable of `huggingface_hub.EvalResult`): As from [`hf_sai.hub.metrics.card_results`].
    """
    path, found = Path(card), plain_results(results)
    content, name = read_card(path), path.absolute().parent.name
    if content is not None and found:
        save_card(path, _edited(content, lambda header: header.add_results(found, name), str(path)))


def read_card(path: Path, what: str = "is left as it is") -> str | None:
    """The card in a file; `None`, with a warning of `what` happens to it, where it is no card that can be read."""
    try:
        return decode_card(path.read_bytes())
    except (CardError, OSError) as error:
        logger.warning("%s %s: %s; correct it, or take it away for a new one.", path, what, error)
        return None


def decode_card(content: bytes) -> str:
    """A card's text, with line endings and byte order mark as they are; a `CardError` where the Hub can't read it."""
    if len(content) > LARGEST:
        raise CardError(f"a card may have {LARGEST:,} bytes, but it has {len(content):,}")
    try:
        text = content.decode("utf-8")
        _loaded(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CardError(f"a card must be UTF-8, but line {line} holds the byte {content[error.start]:#04x}") from None
    except Exception as error:  # of PyYAML or huggingface_hub, of many types: all say that it can't be read
        told = " ".join(str(error).split(" Pass `ignore_metadata_errors")[0].split()).rstrip(".")
        raise CardError(f"a card must have a YAML header that can be read, but: {told}") from None
    return text


def save_card(path: Path, content: str) -> None:
    """Writes a card that can be read again; another one is not written over what is there, which is a warning."""
    try:
        decode_card(content.encode("utf-8"))
    except (CardError, UnicodeEncodeError) as error:
        logger.warning("%s is left as it is: the new one could not be read again (%s).", path, error)
        return
    write_whole(path, content.encode("utf-8"))


def mark_generated(path: Path) -> None:
    """Notes in a card that a host has just generated it, so that an edit by a person can be told from it later."""
    content = read_card(path)
    if content is not None and _STAMP.search(content) is None:
        save_card(path, _stamped(content))


def is_generated(content: str) -> bool:
    """Whether a card is, but for our section, as a host generated it: no person has edited it."""
    stamp = _STAMP.search(content)
    return stamp is not None and stamp[1] == _digest(content)


@contextlib.contextmanager
def back_on_error(path: Path, earlier: str) -> Iterator[None]:
    """While it is open, an error brings a card back that stood there before it; it may be a person's."""
    try:
        yield
    except BaseException:
        if earlier:
            write_whole(path, earlier.encode("utf-8"))
        raise


@contextlib.contextmanager
def card_aside(path: Path) -> Iterator[bytes | None]:
    """
    While it is open, a card that can't be read stands beside its place: PEFT reads the card of a folder that it saves
    to, and a training would end there. Afterwards it is back. Yields its bytes; `None` where there are none.
    """
    before: bytes | None = None
    with contextlib.suppress(OSError):
        before = path.read_bytes()
    aside = path.with_name(f"_{path.name}")
    unreadable = path.is_file() and read_card(path) is None
    if unreadable:
        os.replace(path, aside)
    try:
        yield before
    finally:
        if unreadable:
            os.replace(aside, path)


def keep_card(path: Path, before: bytes | None, report: GSNRReport | None, repo_id: str | None) -> None:
    """
    After a host's save, with what stood there before it: a card that it wrote anew gets our section, or without a
    report the mark that it is generated; one that it changed is as it was.
    """
    after = path.read_bytes() if path.is_file() else before
    if after is None or after == before:
        return
    of_ours = [BEGIN.encode() in each or _STAMP_START in each for each in (before or b"", after)]
    written = of_ours[1] and is_generated(after.decode("utf-8"))  # with our section, by `finish_own_cards`
    # PEFT takes tags out of a card that is there, a person's too.
    if before is not None and of_ours != [True, False] and not (of_ours[0] and written):
        write_whole(path, before)
    elif report is not None and _FORM not in after:
        update_card(path, report, earlier=(before or b"").decode("utf-8"), repo_id=repo_id)
    elif before is not None and not is_generated(before.decode("utf-8")):
        write_whole(path, before)
    else:  # of another optimizer, or a form to be filled in, PEFT's for one
        mark_generated(path)


def merge_cards(ours: str, theirs: str, place: str = "The card on the Hub") -> str:
    """
    The card to push over one that is on the Hub.

    Where people have edited the one on the Hub and nobody has edited ours, it is theirs with our section and tags,
    and with the fields that its header lacks; else it is ours. A warning calls theirs `place`.
    """
    if ours == theirs or is_generated(theirs):
        return ours
    if not is_generated(ours):
        if _plain(ours) != _plain(theirs):
            logger.warning("The card here and the one on the Hub were both edited: pushing the one here.")
        return ours
    section = SECTION.search(ours)
    content = _with_header_of(theirs, ours, place)
    return content if section is None else _with_section(content, section[0])


def name_repository(content: str, repo_id: str) -> str:
    """The card with the repository's name in our section's examples."""
    return SECTION.sub(lambda section: section[0].replace(THIS_REPO, repo_id), content)


def _loaded(content: str) -> ModelCard:
    """As huggingface_hub loads it, which warns where a card has no header, or an empty one."""
    parts = split_card(content)
    return ModelCard(content.removeprefix("\ufeff") if parts.source else f"---\n\n---\n{parts.text}")


def _edited(content: str, edit: Callable[[Header], None], place: str) -> str:
    """The card with its header edited, or, where that can't be done safely, as it is, with a warning."""
    parts = split_card(content)
    try:
        header = header_of(parts)
        edit(header)
    except HeaderError as error:
        logger.warning("The header of %s is left as it is: %s.", place, error)
        return content
    return join_card(parts, header.source)


def _with_section(content: str, section: str) -> str:
    parts = split_card(content)
    return "".join(parts[:3]) + insert_section(_STAMP.sub("", parts.text), section, newline_of(content))


def _put_right(content: str, report: GSNRReport) -> str:
    """What a host generated, with the optimizer that ran and without paths; our own section is written anew anyway."""
    options = [
        f"{name}=({shown(value)})" if isinstance(value, list) else f"{name}={value}"
        for name, value in report.options.items()
        if value is not None
    ]
    optimizer = f"{report.optimizer} of hf_sai with {', '.join(options)}; see the section Optimizer"
    local: dict[str, str] = {}

    def edit(header: Header) -> None:
        local.update(local_names(header))
        drop_local_models(header)
        correct_header(header, local)

    content = _edited(content, edit, "the card that was generated")
    parts = split_card(content)
    return "".join(parts[:3]) + corrected_text(parts.text, optimizer, local)


def _with_header_of(person: str, host: str, place: str) -> str:
    """A person's card, with fields and tags of another where it has none."""
    try:
        fields = dict(header_of(split_card(host)).data)
    except HeaderError:
        return person
    tags = fields.pop("tags", None) or []
    fields.pop(MODEL_INDEX, None)
    data = _loaded(host).data

    def edit(header: Header) -> None:
        drop_local_models(header)
        for key, value in fields.items():
            if key not in header.data:
                header.append(key, value)
        header.extend("tags", as_list(tags))
        header.add_results(data.eval_results or (), data.model_name or "")

    return _edited(person, edit, place)


def _plain(content: str) -> tuple[str, str]:
    """Header and text without our section."""
    card = _loaded(content)
    text = _STAMP.sub("", SECTION.sub("", card.text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return json.dumps(card.data.to_dict(), sort_keys=True, default=str), "\n".join(lines)


def _digest(content: str) -> str:
    return hashlib.sha256("\n".join(_plain(content)).encode()).hexdigest()[:16]


def _stamped(content: str) -> str:
    line = newline_of(content)
    content = _STAMP.sub("", content).rstrip()
    return f"{content}{line}{line}<!-- hf-sai:generated {_digest(content)} -->{line}"
