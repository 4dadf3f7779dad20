"""Files to a repository of the Hub: one commit, repeated while that can help, and never longer than a time-out."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from trainer_patches.tokens import MASK, TOKEN, TOKEN_BYTES


logger = logging.getLogger(__name__)

TIMEOUT = 3600.0  # seconds: some 70 GB over a line of 20 MB/s
WAITS = (1.0, 4.0, 16.0)  # seconds before each repetition
LONGEST_WAIT = 300.0  # seconds: more is not waited for, whatever Retry-After says
_TRANSIENT = frozenset({408, 409, 412, 429, 500, 502, 503, 504})
# Of httpx or httpx2, by the version of huggingface_hub: every error of a connection derives from it.
_HTTP_ERROR = HfHubHTTPError.__bases__[0]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".onnx", ".h5", ".msgpack")
_SMALL = 16 * 2**20  # bytes: weights below that are looked through as well, training_args.bin among them

_Result = TypeVar("_Result")
Files = Mapping[str, "Path | bytes"]


class UploadError(ValueError, RuntimeError):
    """Files could not be uploaded; none of them was."""


class TokenInFileError(UploadError):
    """A file that was to be uploaded holds an access token."""


@dataclass(frozen=True)
class Destination:
    """
    Where files go.

    Args:
        repo_id (`str`): Such as `"user/repo"`; without a user it is the token's.
        private (`bool`, *optional*): Visibility where the repository has to be made; one that is there keeps its own.
        revision (`str`, *optional*): Branch, made where it is missing; defaults to `main`.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
        token (`str` or `bool`, *optional*): As in `huggingface_hub`; defaults to the one that is logged in.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    token: str | bool | None = None


def upload(
    files: Files,
    destination: Destination,
    message: str,
    *,
    timeout: float = TIMEOUT,
    revise: Callable[[HfApi, ModelInfo, Files], Files] | None = None,
) -> CommitInfo:
    """
    Uploads files in one commit: all of them or none.

    The repository and its visibility are logged before anything is sent. What may pass by itself (429, 5xx, a lost
    connection, a commit of another in between) is tried again, after as long as the Hub asks for.

    Args:
        files (mapping): From the path in the repository to a path here or to the content.
        destination (`Destination`): Where to.
        message (`str`): Of the commit.
        timeout (`float`, *optional*, defaults to 3600): Seconds, all in all.
        revise (callable, *optional*): From the API, the repository as it is and the files to the files to commit;
            what it saw is still there when they are committed, or it is called again.

    Returns:
        `huggingface_hub.CommitInfo`: Of the commit.

    Raises:
        `TokenInFileError`: A file holds a token; nothing was sent.
        `UploadError`: It did not work out.
    """
    if destination.create_pr and destination.revision not in (None, "main"):
        raise UploadError(
            f"a pull request goes against main, but revision is {destination.revision!r}; leave out one of them"
        )
    refuse_tokens(files, known_tokens(destination.token))
    given_up = threading.Event()
    job = _Upload(files, destination, message, revise, time.monotonic() + timeout, given_up)
    try:
        return within(timeout, job.run)
    except UploadError:
        raise
    except Exception as error:
        raise UploadError(reason(error, destination.token)) from None
    finally:
        given_up.set()


@dataclass
class _Upload:
    files: Files
    destination: Destination
    message: str
    revise: Callable[[HfApi, ModelInfo, Files], Files] | None
    end: float
    given_up: threading.Event
    _said: str = ""
    _sent: bool = False

    def run(self) -> CommitInfo:
        waits = iter(WAITS)
        while True:
            try:
                return self._attempt()
            except Exception as error:
                wait = next(waits, None)
                answered = any(isinstance(each, HfHubHTTPError) for each in _chain(error))
                if self._sent and self.destination.create_pr and not answered:
                    raise  # a second pull request might be the result
                if wait is None or not is_transient(error):
                    raise
                wait = max(wait, _retry_after(error))
                if wait > min(LONGEST_WAIT, self.end - time.monotonic()):
                    raise
                logger.warning("The upload to %s is tried again in %g s.", self.destination.repo_id, wait)
                time.sleep(wait)

    def _attempt(self) -> CommitInfo:
        to = self.destination
        api = HfApi(token=to.token, library_name="hf_sai")
        info = self._repository(api)
        self._check_time()
        files = self.files if self.revise is None else self.revise(api, info, self.files)
        operations = [
            CommitOperationAdd(
                path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content)
            )
            for name, content in sorted(files.items())
        ]
        # One by one: for several the client starts threads that Python waits for at its end, however long they take.
        for operation in operations:
            self._check_time()
            api.preupload_lfs_files(
                info.id, [operation], revision=to.revision, create_pr=to.create_pr, free_memory=False
            )
        self._check_time()
        self._sent = True
        return api.create_commit(
            info.id,
            operations,
            commit_message=self.message,
            revision=to.revision,
            create_pr=to.create_pr,
            parent_commit=None if to.create_pr else info.sha,
        )

    def _repository(self, api: HfApi) -> ModelInfo:
        """The repository at the revision; made where it is missing."""
        to = self.destination
        name = to.repo_id if "/" in to.repo_id else f"{api.whoami()['name']}/{to.repo_id}"
        try:
            info = api.model_info(name)
            self._say(info.id, "private" if info.private else "public")
            if to.private and not info.private:
                logger.warning("%s is public already and stays so: private=True is for a new one.", info.id)
        except RepositoryNotFoundError:
            self._say(name, f"new, {_visibility(to.private)}")
            name = api.create_repo(name, private=to.private, exist_ok=True).repo_id
            info = api.model_info(name)
        if to.revision is None or to.create_pr:
            return info
        try:
            return api.model_info(info.id, revision=to.revision)
        except RevisionNotFoundError:
            api.create_branch(info.id, branch=to.revision, exist_ok=True)
            return api.model_info(info.id, revision=to.revision)

    def _say(self, repo_id: str, visibility: str) -> None:
        to = self.destination
        goal = "as a pull request" if to.create_pr else f"revision {to.revision or 'main'}"
        size = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in self.files.values())
        text = f"Uploading {len(self.files)} files ({size:,} bytes) to {repo_id} ({visibility}), {goal}."
        if text != self._said:
            logger.info(text)
            self._said = text

    def _check_time(self) -> None:
        """So that an upload that was given up does not commit later, over what came after it."""
        if self.given_up.is_set():
            raise UploadError(f"the upload to {self.destination.repo_id} was given up")


def _visibility(private: bool | None) -> str:
    if private is None:
        return "visibility as the account's default"
    return "private" if private else "public"


def within(seconds: float, function: Callable[[], _Result]) -> _Result:
    """
    What a function returns or raises, if it does so in time; if not, it is left behind in a thread that does not
    keep the process from ending.

    Raises:
        `UploadError`: It took longer.
    """
    outcome: Future[_Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="hf_sai upload", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome.done():
        raise UploadError(f"an upload must be done in {seconds:g} s, but this one was not; raise the time-out")
    return outcome.result()


def is_transient(error: BaseException) -> bool:
    """Whether the same request may work a little later."""
    for each in _chain(error):
        if isinstance(each, HfHubHTTPError):
            return each.response.status_code in _TRANSIENT
        if isinstance(each, (_HTTP_ERROR, json.JSONDecodeError, ConnectionResetError)):
            return True
    return False


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    """An error and what it was raised from: the client wraps what happens in an upload."""
    while error is not None:
        yield error
        error = error.__cause__


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks for; 0.0 where it asks for none."""
    for each in _chain(error):
        if isinstance(each, HfHubHTTPError):
            value = each.response.headers.get("Retry-After", "")
            return float(value) if value.strip().isdigit() else 0.0
    return 0.0


def reason(error: BaseException, token: str | bool | None = None) -> str:
    """One line that says what happened, down to the cause; without any token."""
    lines = []
    for each in _chain(error):
        text = " ".join(line.strip() for line in str(each).splitlines() if line.strip())
        lines.append(f"{type(each).__name__}: {text}" if text else type(each).__name__)
        if isinstance(each, HfHubHTTPError):  # says all
            break
    return without_tokens("; ".join(lines), known_tokens(token))


def known_tokens(token: str | bool | None = None) -> set[str]:
    """The token that is given and the one that is logged in; both may look like anything."""
    return {each for each in (token, get_token()) if isinstance(each, str) and each}


def refuse_tokens(files: Files, secrets: Iterable[str]) -> None:
    """
    Raises `TokenInFileError`, with the file's name, where a file holds one of these or what looks like a token.

    Weights of more than 16 MiB are not looked through.
    """
    wanted = [secret.encode() for secret in secrets]
    for name, content in files.items():
        if isinstance(content, Path):
            if content.suffix in _WEIGHTS and content.stat().st_size > _SMALL:
                continue
            content = content.read_bytes()
        if any(secret in content for secret in wanted) or TOKEN_BYTES.search(content):
            raise TokenInFileError(
                f"no file that is uploaded may hold an access token, but {name} does; take it out (and revoke it if "
                "the file was shared)"
            )


def without_tokens(text: str, secrets: Iterable[str]) -> str:
    """`text` with each token replaced by `<TOKEN>`."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return TOKEN.sub(MASK, text)
