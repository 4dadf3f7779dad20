"""A run's folder to the Hub: model, report, picture and card in one commit, or a command to do so later."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelInfo, constants, get_token, hf_hub_download
from huggingface_hub.utils import filter_repo_objects

from ..upload import (
    CARD,
    TIMEOUT,
    Destination,
    Files,
    RequestError,
    TokenInFileError,
    UploadError,
    checked,
    checked_token,
    known_tokens,
    reason,
    refuse_tokens,
    upload,
    within,
)
from .card import CardError, decode_card, merge_cards, name_repository, read_card


logger = logging.getLogger(__name__)

# Not part of a model: what a training needs to go on, checkpoints, and what is being written.
IGNORED = (
    *("_*", "*/_gsnr_*", "checkpoint-*", "global_step*", "optimizer.*", "optimizer_[0-9]*", "scheduler.pt"),
    *("scaler.pt", "rng_state*", "random_states_*", ".git/*", ".cache/*", "*/.git/*", "*/.cache/*"),
)
ADAPTER_CONFIG = "adapter_config.json"
BASE_WEIGHTS = ("model.safetensors*", "model-*.safetensors", "pytorch_model*")
# One of these, or weights, makes a folder a run's.
_OF_A_RUN = ("config.json", "adapter_config.json", "model_index.json", "modules.json", "gsnr_report.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


class PushError(UploadError):
    """A push did not work out; where the same push can work later, the message ends with its command."""


class NothingToPushError(PushError, RequestError):
    """There is no such folder, or no file in it."""


@dataclass(frozen=True)
class Push:
    """What goes where, as a value that can be repeated."""

    folder: Path
    destination: Destination
    path_in_repo: str = ""  # a folder in the repository; its root where it is empty
    ignored: tuple[str, ...] = IGNORED  # patterns of what stays here
    message: str = "Model, report and card"  # of the commit
    timeout: float = TIMEOUT  # seconds, all in all

    def files(self) -> dict[str, Path]:
        """
        What would be pushed, from the path in the repository to the path here; an adapter goes without its base
        model's weights. No folder, or nothing in it, is a `NothingToPushError`.
        """
        if not self.folder.is_dir():
            kind = "a file" if self.folder.exists() else "not there"
            raise NothingToPushError(
                f"a push needs a folder, but {self.folder}, which is {kind}, is none; pass the run's output_dir"
            )
        found = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*"))}
        adapter = BASE_WEIGHTS if ADAPTER_CONFIG in found and not self.path_in_repo else ()
        names = filter_repo_objects(
            (name for name, path in found.items() if path.is_file()), ignore_patterns=[*self.ignored, *adapter]
        )
        prefix = f"{self.path_in_repo.strip('/')}/" if self.path_in_repo else ""
        files = {f"{prefix}{name}": found[name] for name in names}
        if not files:
            raise NothingToPushError(
                f"a push needs files, but {self.folder} holds none; train or save the model first"
            )
        return files

    def check(self) -> list[str]:
        """
        Does all of a push that can be done without sending anything: raises where it can't work, and says in
        sentences what it would do otherwise than a person may think.
        """
        files, to = self.files(), checked(self.destination)
        refuse_tokens(files, known_tokens(to.token))
        notes = []
        if to.token is False or not (to.token or get_token()):
            notes.append("a push needs a token, but there is none; run hf auth login, or set HF_TOKEN")
        if constants.HF_HUB_OFFLINE:
            notes.append("a push needs the Hub, but HF_HUB_OFFLINE is set; unset it")
        names = [path.name for path in files.values()]
        if not set(names) & set(_OF_A_RUN) and not list(filter_repo_objects(names, allow_patterns=list(_WEIGHTS))):
            notes.append(f"{self.folder} holds neither a model nor a report; pass the run's output_dir")
        if CARD in files:
            try:
                decode_card(files[CARD].read_bytes())
            except CardError as error:
                notes.append(f"{files[CARD]} is left out of a push, for it can't be read: {error}")
        return notes

    def command(self) -> str:
        """The command line that does the same; it holds no token."""
        to = self.destination
        folder = str(self.folder.absolute())
        if self.path_in_repo:  # a checkpoint, optimizer state and all
            words = ["hf", "upload", to.repo_id, folder, self.path_in_repo]
        else:
            words = ["hf-sai", "push", folder, to.repo_id]
        words += ["--private"] if to.private else []
        words += ["--revision", to.revision] if to.revision else []
        words += ["--create-pr"] if to.create_pr else []
        return shlex.join(words)

    def run(self, strict: bool = False) -> CommitInfo | None:
        """
        Pushes, as [`push_folder`] says; without `strict` a failure is a warning with the command to run later, and
        the result is `None`.
        """
        failure: UploadError
        try:
            revise = None if self.path_in_repo else card_for
            return upload(self.files(), self.destination, self.message, timeout=self.timeout, revise=revise)
        except NothingToPushError as error:
            failure = error
        except RequestError as error:  # the same push again would end the same
            failure = PushError(f"The push to {self.destination.repo_id} can't work: {error}")
        except (UploadError, OSError) as error:
            kind = TokenInFileError if isinstance(error, TokenInFileError) else PushError
            remedy = f"everything is in {self.folder}, and this pushes it: {self.command()}"
            failure = kind(f"The push to {self.destination.repo_id} failed ({error}); {remedy}")
        if strict:
            raise failure
        logger.warning(str(failure))
        return None


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = Push.message,
    strict: bool = True,
    timeout: float = TIMEOUT,
) -> CommitInfo | None:
    """
    Pushes a run's folder in one commit: model or adapter, report, picture and card.

    Checkpoints, optimizer state and what begins with `_` stay here, and so do the base model's weights beside an
    adapter. A card that people edited on the Hub keeps their text.

    Args:
        folder (`str` or path): Such as the run's `output_dir`.
        repo_id (`str`): Such as `"user/repo"`; without a user it is the token's.
        private (`bool`, *optional*): Visibility where the repository has to be made; one that is there keeps its own.
        revision (`str`, *optional*): Branch, made where it is missing; defaults to `main`.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`; defaults to the one that is logged in.
        commit_message (`str`, *optional*): Of the commit.
        strict (`bool`, *optional*, defaults to `True`): Whether a failure is an error and not a warning.
        timeout (`float`, *optional*, defaults to 3600): Seconds, all in all.

    Returns:
        `huggingface_hub.CommitInfo`: Of the commit; `None` where it failed and `strict` is not set.

    Raises:
        `PushError`: It failed.
        `TokenInFileError`: A file holds an access token; nothing was sent.

    Example:

    ```python
    push_folder("out", "user/repo", private=True)
    ```
    """
    destination = Destination(repo_id, private, revision, create_pr, token)
    return Push(Path(folder), destination, message=commit_message, timeout=timeout).run(strict)


@dataclass
class HostPushes:
    """
    The Hub as a Trainer sees it: `create_repo` and `upload_folder` of `huggingface_hub` by name, neither of which ends
    a training.
    """

    strict: bool  # whether a push that the trainer waits for raises when it fails
    timeout: float  # seconds that one push may take
    private: bool | None = None  # goes before what the trainer asks for
    create_pr: bool = False
    _pending: list[Future[CommitInfo | None]] = field(default_factory=list)
    _turns: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "hf_sai push"))

    @contextlib.contextmanager
    def asked(self, private: bool | None, create_pr: bool) -> Iterator[None]:
        """While it is open, pushes are as one call asks; a `private` of `None` leaves it as it was."""
        before = self.private, self.create_pr
        self.private, self.create_pr = (self.private if private is None else private), create_pr
        try:
            yield
        finally:
            self.private, self.create_pr = before

    def create_repo(self, repo_id: str, token: str | None = None, private: bool | None = None, **unused: Any) -> Any:
        """As `huggingface_hub.create_repo`; where that fails, the id as it was asked for: the push tries again."""
        self.private = private = private if self.private is None else self.private
        try:
            api = HfApi(token=checked_token(token), library_name="hf_sai")
            return within(self.timeout, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        except Exception as error:
            text = "The repository %s could not be made (%s); training goes on, a push tries again."
            logger.warning(text, repo_id, reason(error, token))
            return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        path_in_repo: str = "",
        token: str | None = None,
        revision: str | None = None,
        ignore_patterns: Iterable[str] = (),
        run_as_future: bool = False,
    ) -> Any:
        """As `huggingface_hub.upload_folder`, in one commit; see [`Push.run`]."""
        destination = Destination(repo_id, self.private, revision, self.create_pr, token)
        ignored = ("_*",) if path_in_repo else (*IGNORED, *ignore_patterns)
        push = Push(Path(folder_path), destination, path_in_repo, ignored, commit_message, self.timeout)
        if not run_as_future:
            return push.run(self.strict)
        future = self._turns.submit(_run_until, push, time.monotonic() + self.timeout)
        self._pending = [each for each in self._pending if not each.done()] + [future]
        return future

    def wait(self) -> None:
        """Waits for the pushes in the background; all of them end in time."""
        wait(self._pending)


def _run_until(push: Push, end: float) -> CommitInfo | None:
    """A push whose turn has come; it ends in time, so that Python may wait for its thread."""
    left = end - time.monotonic()
    if left > 0.0:
        return replace(push, timeout=left).run()
    logger.warning("A push to %s was left out: the one before it took too long.", push.destination.repo_id)
    return None


def card_for(api: HfApi, info: ModelInfo, files: Files) -> Files:
    """
    The files with the card as it has to be there: it names the repository, and keeps what people wrote on the Hub; see
    [`hf_sai.hub.card.merge_cards`]. A card that can't be read, here or there, is left out, with a warning: it does not
    keep the model back.
    """
    ours = files.get(CARD)
    if not isinstance(ours, Path):
        return files
    others = {name: content for name, content in files.items() if name != CARD}
    card = read_card(ours, "is left as it is and not pushed")
    if card is None:
        return others
    place, remedy = f"{CARD} of {info.id}", "correct or delete it there, and push again"
    try:
        if any(each.rfilename == CARD for each in info.siblings or []):
            file = hf_hub_download(info.id, CARD, revision=info.sha, token=api.token, endpoint=api.endpoint)
            card = merge_cards(card, decode_card(Path(file).read_bytes()), place)
        remedy = "the new one could not be read again"
        content = name_repository(card, info.id).encode("utf-8")
        decode_card(content)
    except CardError as error:
        logger.warning("%s on the Hub is left as it is, and the other files are pushed: %s; %s.", place, error, remedy)
        return others
    return {**others, CARD: content}
