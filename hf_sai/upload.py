"""Files to a repository of the Hub: one commit, repeated while that can help, and never longer than a time-out."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from trainer_patches.tokens import MASK, TOKEN_BYTES


logger = logging.getLogger(__name__)

TIMEOUT = 3600.0  # seconds: some 70 GB over a line of 20 MB/s
WAITS = (1.0, 4.0, 16.0)  # seconds before each repetition
LONGEST_WAIT = 300.0  # seconds: more is not waited for, whatever Retry-After says
_TRANSIENT = frozenset({408, 409, 412, 429, 500, 502, 503, 504})
CARD = "README.md"
_REFUSED_CARD = "Invalid metadata in README.md"  # so begins the client's error, before anything is sent
# What no repetition changes, of httpx or httpx2 by name: a header, an address or a certificate that can't be right.
_FINAL = {"LocalProtocolError", "UnsupportedProtocol", "TooManyRedirects", "SSLCertVerificationError"}
# Of httpx or httpx2, by the version of huggingface_hub: every error of a connection derives from it.
_HTTP_ERROR = HfHubHTTPError.__bases__[0]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".onnx", ".h5", ".msgpack")
_SHORT = 8  # characters: as much may stand inside another word
_SMALL = 16 * 2**20  # bytes: weights below that are looked through as well, training_args.bin among them

_Result = TypeVar("_Result")
Files = Mapping[str, "Path | bytes"]


class UploadError(ValueError, RuntimeError):
    """Files could not be uploaded; none of them was."""


class TokenInFileError(UploadError):
    """A file that was to be uploaded holds an access token."""


class RequestError(UploadError):
    """What was asked for can't be done, however often it is tried."""


@dataclass(frozen=True)
class Destination:
    """Where files go."""

    repo_id: str  # user/repo; without a user it is the token's
    private: bool | None = None  # visibility where the repository has to be made; one that is there keeps its own
    revision: str | None = None  # a branch, made where it is missing; defaults to main
    create_pr: bool = False  # whether to open a pull request instead
    token: str | bool | None = None  # as in huggingface_hub; defaults to the one that is logged in


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
        `RequestError`: The destination or the token can't be right; nothing was sent.
        `UploadError`: It did not work out.
    """
    destination = checked(destination)
    refuse_tokens(files, known_tokens(destination.token))
    job = _Upload(files, destination, message, revise, time.monotonic() + timeout)
    try:
        return within(timeout, job.run)
    except UploadError:
        raise
    except Exception as error:
        raise UploadError(reason(error, destination.token) + _remedy(error)) from None
    finally:
        job.given_up.set()


def checked(destination: Destination) -> Destination:
    """
    The destination with its token stripped; a `RequestError` where no push to it can work: of its name, its token, or
    a pull request against a branch.
    """
    to = destination
    if to.create_pr and to.revision not in (None, "main"):
        raise RequestError(f"a pull request goes against main, but revision is {to.revision!r}; leave out one of them")
    try:
        validate_repo_id(to.repo_id)
    except (HFValidationError, TypeError) as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise RequestError(f"a repository is user/name, but the one given is {to.repo_id!r}: {told}") from None
    token = checked_token(to.token)
    if token is None or token is True:
        checked_token(get_token())  # of HF_TOKEN or a file: no error of it would say what is wrong
    return replace(to, token=token)


def checked_token(token: str | bool | None) -> str | bool | None:
    """The token without blanks around it; a `RequestError`, which does not show it, where it can be none."""
    if token is None or isinstance(token, bool):
        return token
    where = "make one at https://huggingface.co/settings/tokens, or leave it out to use the one of hf auth login"
    if not isinstance(token, str):
        raise RequestError(f"a token must be a text, but the one given is a {type(token).__name__}; {where}")
    token = token.strip()
    if not token:
        raise RequestError(f"a token must be a word such as hf_..., but the one given is empty; {where}")
    if not all("!" <= each <= "~" for each in token):
        raise RequestError(
            f"a token must be one word of ASCII, but the one given (<TOKEN>, {len(token)} characters) has blanks or "
            f"other signs in it; {where}"
        )
    return token


@dataclass
class _Upload:
    files: Files
    destination: Destination
    message: str
    revise: Callable[[HfApi, ModelInfo, Files], Files] | None
    end: float
    given_up: threading.Event = field(default_factory=threading.Event)
    said: str = ""
    sent: bool = False
    refused: bool = False

    def run(self) -> CommitInfo:
        waits = iter(WAITS)
        while True:
            try:
                return self._attempt()
            except Exception as error:
                if self._leaves_card_out(error):
                    continue
                wait = next(waits, None)
                if self.sent and self.destination.create_pr and _answer(error) is None:
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
        files = dict(self.files if self.revise is None else self.revise(api, info, self.files))
        if self.refused:
            files.pop(CARD, None)
        if not files:
            raise RequestError(f"a push needs files, but {CARD}, which can't be pushed, is all that there is")
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        # One by one: for several the client starts threads that Python waits for at its end, however long they take.
        for operation in operations:
            self._check_time()
            api.preupload_lfs_files(
                info.id, [operation], revision=to.revision, create_pr=to.create_pr, free_memory=False
            )
        self._check_time()
        self.sent = True
        return api.create_commit(
            info.id,
            operations,
            commit_message=self.message,
            revision=to.revision,
            create_pr=to.create_pr,
            parent_commit=None if to.create_pr else info.sha,
        )

    def _leaves_card_out(self, error: Exception) -> bool:
        """Whether the Hub refuses the header of the card, and only that: it does not keep the other files back."""
        if self.refused or not isinstance(error, ValueError) or not str(error).startswith(_REFUSED_CARD):
            return False
        told = without_tokens(" ".join(str(error).split()), known_tokens(self.destination.token))
        text = "%s is not pushed to %s, the other files are: the Hub refuses it (%s). Correct it and push again."
        logger.warning(text, CARD, self.destination.repo_id, told)
        self.refused = True
        return True

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
            kinds = {None: "visibility as the account's default", True: "private", False: "public"}
            self._say(name, f"new, {kinds[to.private]}")
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
        if text != self.said:
            logger.info(text)
            self.said = text

    def _check_time(self) -> None:
        """So that an upload that was given up does not commit later, over what came after it."""
        if self.given_up.is_set():
            raise UploadError(f"the upload to {self.destination.repo_id} was given up")


def within(seconds: float, function: Callable[[], _Result]) -> _Result:
    """
    What a function returns or raises. One that takes longer is an `UploadError`, and is left behind in a thread that
    does not keep the process from ending.
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
    types = {cls.__name__ for each in _chain(error) for cls in (type(each), type(each.__context__))}
    if types & _FINAL:
        return False
    answer = _answer(error)
    if answer is not None:
        return answer.status_code in _TRANSIENT
    lost = (_HTTP_ERROR, json.JSONDecodeError, ConnectionResetError)
    return any(isinstance(each, lost) for each in _chain(error))


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    """An error and what it was raised from: the client wraps what happens in an upload."""
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> Any:
    """The Hub's response; `None` where there was none."""
    return next((each.response for each in _chain(error) if isinstance(each, HfHubHTTPError)), None)


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks for; 0.0 where it asks for none."""
    answer = _answer(error)
    value = "" if answer is None else answer.headers.get("Retry-After", "")
    return float(value) if value.strip().isdigit() else 0.0


def reason(error: BaseException, token: str | bool | None = None) -> str:
    """One line that says what happened, down to the cause; without any token."""
    lines = []
    for each in _chain(error):
        text = " ".join(line.strip() for line in str(each).splitlines() if line.strip())
        lines.append(f"{type(each).__name__}: {text}" if text else type(each).__name__)
        if isinstance(each, HfHubHTTPError):  # says all
            break
    return without_tokens("; ".join(lines), known_tokens(token))


def _remedy(error: BaseException) -> str:
    """What helps where the same request would be answered the same."""
    remedies = {401: "log in (hf auth login)", 403: "take a token that may write there", 404: "check the name"}
    remedy = remedies.get(getattr(_answer(error), "status_code", 0))
    return f"; {remedy}" if remedy else ""


def known_tokens(token: str | bool | None = None) -> set[str]:
    """The token that is given and the one that is logged in, without blanks around; both may look like anything."""
    return {each.strip() for each in (token, get_token()) if isinstance(each, str) and each.strip()}


def refuse_tokens(files: Files, secrets: Iterable[str]) -> None:
    """
    Raises `TokenInFileError`, with the file's name, where a file holds one of these or what looks like a token.

    Weights of more than 16 MiB are not looked through.
    """
    wanted = _as_sent(secrets)
    for name, content in files.items():
        if isinstance(content, Path):
            if content.suffix in _WEIGHTS and content.stat().st_size > _SMALL:
                continue
            content = content.read_bytes()
        if (wanted and wanted.search(content)) or TOKEN_BYTES.search(content):
            raise TokenInFileError(
                f"no file that is uploaded may hold an access token, but {name} does; take it out (and revoke it if "
                "the file was shared)"
            )


def without_tokens(text: str, secrets: Iterable[str]) -> str:
    """`text` with each token replaced by `<TOKEN>`, in each of the forms that it is sent or shown in."""
    content = text.encode(errors="replace")
    wanted = _as_sent(secrets)
    if wanted:
        content = wanted.sub(MASK.encode(), content)
    return TOKEN_BYTES.sub(MASK.encode(), content).decode()


def _as_sent(secrets: Iterable[str]) -> re.Pattern[bytes] | None:
    """Finds tokens as they are, percent-encoded and escaped; a short one as a whole word only. `None` of none."""
    words = {secret.strip() for secret in secrets} - {""}
    forms = {form for word in words for form in (word, quote(word, safe=""), repr(word)[1:-1], json.dumps(word)[1:-1])}
    found = [re.escape(form.encode(errors="replace")) for form in sorted(forms, key=len, reverse=True)]
    whole = [each if len(each) >= _SHORT else rb"(?<!\w)" + each + rb"(?!\w)" for each in found]
    return re.compile(b"|".join(whole)) if whole else None
