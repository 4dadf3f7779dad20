"""Pushes through the real client to a loopback Hub that fails in every way at every stage."""

from __future__ import annotations

import importlib
import logging
import os
import random
import shlex
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from hub_server import STAGES, connected, loopback_hub, online, wait_until
from huggingface_hub.errors import HfHubHTTPError
from support.hub import FOREVER, OTHER_TOKEN, TOKEN, command_in
from typer.testing import CliRunner

from hf_sai.cli import app
from hf_sai.hub.push import Destination, HostPushes, Push, PushError, TokenInFileError, push_folder
from hf_sai.upload import LONGEST_WAIT, UploadError, is_transient, refuse_tokens, within, without_tokens


CARD = "---\nlicense: mit\n---\n\n# A card\n"
PASSES = (409, 412, 429, 500, 503, "reset", "lost", "truncated")
STAYS = (401, 403, 404)


@pytest.fixture
def hub(monkeypatch):
    with loopback_hub() as hub, connected(hub, monkeypatch):
        yield hub


@pytest.fixture
def sleeps(monkeypatch):
    """Nobody sleeps; the seconds that somebody wanted to."""
    wanted = []
    monkeypatch.setattr(time, "sleep", wanted.append)
    return wanted


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "out")


def make_folder(path, **more):
    path.mkdir()
    files = {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": "adapter",
        "gsnr_report.json": "{}",
        "gsnr_report.png": "picture",
        "README.md": CARD,
    }
    for name, content in {**files, **more}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return path


PUSHED = [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]
PUSHED += ["gsnr_report.json", "gsnr_report.png"]


@pytest.mark.parametrize("token", [TOKEN, TOKEN.replace("hf_", "hf_oauth_")])
def test_what_looks_like_a_token_is_found_without_knowing_it(token):
    with pytest.raises(TokenInFileError, match=r"notes\.txt"):
        refuse_tokens({"notes.txt": f"my key is {token}.".encode()}, [])
    refuse_tokens({"notes.txt": b"hf_hub_download_and_then_something_else_of_that_kind"}, [])


def test_a_folder_is_one_commit_of_what_belongs_to_a_model(hub, tmp_path, caplog):
    more = dict.fromkeys(
        ("_old.json", "checkpoint-3/model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"), "stays"
    )
    base = dict.fromkeys(("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"), "the base")
    folder = make_folder(tmp_path / "out", **more, **base, **{"runs/events": "goes"})
    with caplog.at_level(logging.INFO, logger="hf_sai"):
        commit = push_folder(folder, "user/run", private=True, token=TOKEN, commit_message="what was trained")
    repo = hub.repos["user/run"]
    assert sorted(repo.tree()) == [*PUSHED, "runs/events"]
    assert repo.branches["main"][1:] == [commit.oid]
    assert repo.messages[commit.oid] == "what was trained"
    assert repo.private
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_sai")]
    size = sum((folder / name).stat().st_size for name in [*PUSHED[1:], "runs/events"])
    assert said == [f"Uploading 6 files ({size} bytes) to user/run (new, private), revision main."]
    assert (folder / "README.md").read_text() == CARD


def test_a_full_model_takes_its_weights_along(hub, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "optimizer_notes.md"):
        (folder / name).write_text("x")
    push_folder(folder, "run", token=TOKEN)
    assert sorted(hub.repos["user/run"].tree()) == [
        ".gitattributes",
        "config.json",
        "model.safetensors",
        "optimizer_notes.md",
    ]
    assert not hub.repos["user/run"].private


def test_branch_pull_request_and_a_visibility_that_stays(hub, folder, caplog):
    hub.add("user/run", {"kept.txt": b"theirs"})
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        push_folder(folder, "user/run", private=True, revision="try/1", token=TOKEN)
    repo = hub.repos["user/run"]
    assert "user/run is public already and stays so" in caplog.text
    assert not repo.private
    assert sorted(repo.tree("try/1")) == [*PUSHED[1:], "kept.txt"]
    commit = push_folder(folder, "user/run", create_pr=True, token=TOKEN)
    assert commit.pr_url == f"{hub.endpoint}/user/run/discussions/1"
    assert sorted(repo.tree("refs/pr/1")) == [*PUSHED[1:], "kept.txt"]
    assert list(repo.tree("main")) == ["kept.txt"]
    with pytest.raises(PushError, match="a pull request goes against main, but revision is 'try/1'"):
        push_folder(folder, "user/run", create_pr=True, revision="try/1", token=TOKEN)


def test_a_second_push_of_the_same_is_no_commit(hub, folder):
    first = push_folder(folder, "user/run", token=TOKEN)
    assert push_folder(folder, "user/run", token=TOKEN).oid == first.oid
    assert len(hub.repos["user/run"].branches["main"]) == 2


def test_a_commit_of_another_in_between_is_not_overwritten(hub, folder, monkeypatch):
    """The card is merged with the one on the Hub: what was read has to be what is replaced."""
    hub.add("user/run", {"README.md": CARD.encode()})
    original, moments = hub.preupload, []

    def with_edit(*args):
        if not moments:
            moments.append(hub.add("user/run", {"README.md": b"edited meanwhile"}))
        return original(*args)

    monkeypatch.setattr(hub, "preupload", with_edit)
    push_folder(folder, "user/run", token=TOKEN)
    assert hub.counts["commit"] == 2
    assert hub.repos["user/run"].branches["main"][1] == moments[0]
    assert len(hub.repos["user/run"].branches["main"]) == 3


@pytest.mark.parametrize(("asked", "waited"), [(7, 7.0), (None, 1.0)])
def test_retry_after_is_waited_for(hub, folder, sleeps, asked, waited):
    hub.fail("commit", 429, retry_after=asked)
    assert push_folder(folder, "user/run", token=TOKEN) is not None
    assert sleeps == [waited]


def test_a_wait_beyond_the_time_out_is_not_begun(hub, folder, sleeps):
    for asked, timeout in ((LONGEST_WAIT + 1, 3600), (20, 15)):
        hub.fail("commit", 429, retry_after=int(asked))
        with pytest.raises(PushError, match="429 Too Many Requests"):
            push_folder(folder, "user/run", token=TOKEN, timeout=timeout)
    assert sleeps == []


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, folder):
    hub.add("user/run", {"kept.txt": b""})
    hub.fail("commit", "lost")
    with pytest.raises(PushError, match="failed"):
        push_folder(folder, "user/run", create_pr=True, token=TOKEN)
    assert [name for name in hub.repos["user/run"].branches if name != "main"] == ["refs/pr/1"]


def test_what_never_ends_is_left_behind():
    blocked = threading.Event()
    try:
        with pytest.raises(UploadError, match=r"must be done in 0\.05 s, but this one was not; raise the time-out"):
            within(0.05, blocked.wait)
        left = [thread for thread in threading.enumerate() if thread.name == "hf_sai upload"]
        assert left
        assert all(thread.daemon for thread in left)
    finally:
        blocked.set()


def test_what_was_given_up_commits_nothing_later(hub, folder):
    hub.add("user/run", {"kept.txt": b""})
    hub.fail("preupload", "slow")
    with pytest.raises(PushError, match=r"must be done in 0\.3 s"):
        push_folder(folder, "user/run", token=TOKEN, timeout=0.3)
    hub.over.set()
    wait_until(lambda: not [each for each in threading.enumerate() if each.name == "hf_sai upload"])
    assert hub.counts["preupload"] == 1
    assert hub.counts["commit"] == 0


@pytest.mark.parametrize("place", ["README.md", "training_args.bin", "runs/a/log.txt"])
@pytest.mark.parametrize("secret", [TOKEN, OTHER_TOKEN, "hf_" + "A" * 34])
def test_a_file_with_a_token_is_refused_by_name(hub, tmp_path, place, secret):
    folder = make_folder(tmp_path / "out", **{place: f"\0before {secret} after"})
    used = secret if secret == OTHER_TOKEN else TOKEN
    with pytest.raises(TokenInFileError, match=rf"may hold an access token, but {place} does; take it out") as raised:
        push_folder(folder, "user/run", token=used)
    assert secret not in str(raised.value)
    assert hub.requests == []


def test_a_word_that_begins_like_a_token_is_none(hub, tmp_path):
    folder = make_folder(tmp_path / "out", **{"notes.md": "hf_transformers and hf_" + "_".join(["word"] * 10)})
    assert push_folder(folder, "user/run", token=TOKEN) is not None


@pytest.mark.parametrize("name", ["model.safetensors", "__0_0.distcp"])  # the second is FSDP's
def test_large_weights_are_not_read_for_tokens(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"weights")
    monkeypatch.setattr("hf_sai.upload._SMALL", 6)
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or b"")
    refuse_tokens({name: tmp_path / name}, [TOKEN])
    assert read == []


def test_what_can_not_be_pushed_is_one_sentence(hub, tmp_path):
    for name, kind in (("nowhere", "not there"), ("file", "a file")):
        (tmp_path / "file").write_text("x")
        told = rf"^a push needs a folder, but \S*{name}, which is {kind}, is none; pass the run's output_dir$"
        with pytest.raises(PushError, match=told):
            push_folder(tmp_path / name, "user/run", token=TOKEN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PushError, match=r"a push needs files, but .* holds none"):
        push_folder(tmp_path / "empty", "user/run", token=TOKEN)


def test_the_command_repeats_the_push(tmp_path):
    destination = Destination("user/run", True, "v 1", False, TOKEN)
    push = Push(tmp_path / "my out", destination)
    expected = ["hf-sai", "push", str(tmp_path / "my out"), "user/run", "--private", "--revision", "v 1"]
    assert shlex.split(push.command()) == expected
    checkpoint = Push(tmp_path, Destination("user/run", create_pr=True), "last-checkpoint")
    assert shlex.split(checkpoint.command()) == [
        "hf",
        "upload",
        "user/run",
        str(tmp_path),
        "last-checkpoint",
        "--create-pr",
    ]


@pytest.mark.parametrize("seed", range(100))
def test_a_fault_leaves_all_or_nothing_and_the_command_completes(hub, tmp_path, caplog, sleeps, monkeypatch, seed):
    choose = random.Random(seed)
    stage, kind = STAGES[seed % len(STAGES)], choose.choice([*PASSES, *STAYS, "slow"])
    times = choose.choice([1, 2, FOREVER])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = make_folder(tmp_path / "out")
    if stage not in ("create", "whoami"):
        hub.add("user/run", {"README.md": CARD.replace("A card", "Theirs").encode(), "kept.txt": b"theirs"})
    revision = "v1" if stage == "branch" else None
    timeout = 0.3 if kind == "slow" else 60.0
    hub.fail(stage, kind, times, retry_after=choose.choice([None, 0, 2]))
    repo_id = "run" if stage == "whoami" else "user/run"
    with caplog.at_level(logging.WARNING):
        commit = push_folder(folder, repo_id, revision=revision, strict=False, timeout=timeout)
    assert hub.faults[0].times < times, "the fault was not reached"
    if kind in PASSES and times == 1 and (stage, kind) != ("create", 409):
        assert commit is not None
    done = kind in ("lost", "truncated") or (stage == "lfs_verify" and kind in PASSES)  # and not asked for again
    if kind in STAYS or (times == FOREVER and not done):
        assert commit is None
    assert_all_or_nothing(hub)
    hub.heal()
    hub.over.set()
    if commit is None:
        result = CliRunner().invoke(app, [*command_in(caplog.text), "--strict"])
        assert result.exit_code == 0, result.output
    expected = {name: (folder / name).read_bytes() for name in PUSHED[1:]}
    pushed = hub.repos["user/run"].tree(revision or "main")
    assert {name: content for name, content in pushed.items() if name in expected} == expected
    assert_all_or_nothing(hub)
    assert TOKEN.encode() not in hub.recorded()
    assert TOKEN not in caplog.text


def assert_all_or_nothing(hub):
    repo = hub.repos.get("user/run")
    for branch in repo.branches.values() if repo else ():
        for oid in branch[1:]:
            assert set(PUSHED[1:]) <= set(repo.commits[oid])


def test_pushes_in_the_background_take_turns_and_end(hub, folder, caplog):
    pushes = HostPushes(strict=True, timeout=30.0)
    hub.fail("info", 403, FOREVER)
    options = {"repo_id": "user/run", "commit_message": "step", "token": TOKEN, "run_as_future": True}
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        failed = pushes.upload_folder(folder_path=str(folder), ignore_patterns=["_*"], **options)
        pushes.wait()
    assert failed.result() is None
    assert "this pushes it: hf-sai push" in caplog.text
    hub.heal()
    (folder / "optimizer.pt").write_text("state")
    first = pushes.upload_folder(folder_path=str(folder), **options)
    second = pushes.upload_folder(folder_path=str(folder), path_in_repo="last-checkpoint", **options)
    pushes.wait()
    commits = hub.repos["user/run"].branches["main"]
    assert commits[1:] == [first.result().oid, second.result().oid]
    assert hub.counts["commit"] == 2
    names = {*PUSHED[1:], "optimizer.pt"}
    assert set(hub.repos["user/run"].tree()) == {*PUSHED, *(f"last-checkpoint/{name}" for name in names)}


@pytest.mark.parametrize(
    ("wanted", "asked", "private"), [(True, False, True), (None, True, True), (None, None, False)]
)
def test_what_the_user_says_of_visibility_goes_before_what_the_trainer_asks_for(hub, wanted, asked, private):
    pushes = HostPushes(strict=False, timeout=60.0, private=wanted)
    pushes.create_repo("user/new", token=TOKEN, private=asked, exist_ok=True)
    assert hub.repos["user/new"].private == private


def test_a_push_waits_for_its_turn_no_longer_than_its_time(hub, folder):
    pushes = HostPushes(strict=False, timeout=0.3)
    hub.fail("info", "slow", FOREVER)
    options = {"repo_id": "user/run", "commit_message": "step", "token": TOKEN, "run_as_future": True}
    jobs = [pushes.upload_folder(folder_path=str(folder), **options) for _ in range(3)]
    pushes.wait()
    assert [job.result() for job in jobs] == [None] * 3


def test_dry_run_lists_and_sends_nothing(hub, tmp_path):
    folder = make_folder(tmp_path / "out", _private="x")
    result = CliRunner().invoke(app, ["push", str(folder), "user/run", "--dry-run"])
    assert [line.split()[1] for line in result.output.splitlines()] == PUSHED[1:]
    assert hub.requests == []


@pytest.mark.parametrize("flags", [[], ["--strict"]])
def test_the_command_line_fails_where_nothing_was_pushed(hub, folder, flags, caplog):
    hub.fail("commit", 403, FOREVER)
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        result = CliRunner().invoke(app, ["push", str(folder), "user/run", "--token", TOKEN, *flags])
    assert result.exit_code == 1
    assert "take a token that may write there" in result.output
    said = result.output + caplog.text
    assert command_in(said) == ["push", str(folder), "user/run"]
    assert TOKEN not in said
    hub.heal()
    assert hub.requests[-1][2]["authorization"] == f"Bearer {TOKEN}"


def test_the_command_as_a_process(folder, tmp_path):
    with loopback_hub() as hub:
        words = [sys.executable, "-c", "from hf_sai.cli import app; app()", "push", str(folder), "run", "--private"]
        environment = online(hub, tmp_path / "home", HF_TOKEN=TOKEN)
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        repo = hub.repos["user/run"]
    assert done.stdout.strip() == f"{hub.endpoint}/user/run/commit/{repo.head('main')}", done.stderr
    assert "hf-sai: Uploading 5 files" in done.stderr
    assert "to user/run (new, private), revision main." in done.stderr
    assert sorted(repo.tree()) == PUSHED
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN.encode() not in hub.recorded()
    assert not [path for path in Path(tmp_path).rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert os.environ.get("HF_TOKEN") is None


@pytest.mark.parametrize("around", ["{}\n", " {}", "{}\r\n", "\t{}\t"])
def test_blanks_around_a_token_are_taken_off(hub, folder, around):
    push_folder(folder, "user/run", token=around.format(OTHER_TOKEN))
    assert {headers.get("authorization") for _, path, headers, _ in hub.requests if path.startswith("/api")} == {
        f"Bearer {OTHER_TOKEN}"
    }


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("my odd secret", "has blanks or other signs in it"),
        ("my\x00secret", "has blanks"),
        ("Bearer my-secret", "has blanks"),
        ("my-s\u00e9cret", "other signs"),
        ("my-secret\u2026", "other signs"),
        (b"my-secret", "is a bytes"),
        (12345, "is a int"),
    ],
)
def test_a_token_that_can_be_none_is_an_error_at_once(hub, folder, sleeps, caplog, token, told):
    with pytest.raises(PushError, match=f"a token must be .* but the one given .*{told}.*settings/tokens") as raised:
        push_folder(folder, "user/run", token=token)
    said = str(raised.value) + caplog.text
    assert "secret" not in said
    assert "s\u00e9cret" not in said
    assert "hf-sai push" not in said  # the same again would end the same
    assert (hub.requests, sleeps) == ([], [])
    assert push_folder(folder, "user/run", token=token, strict=False) is None


@pytest.mark.parametrize("token", ["two words", "s\u00e9cret"])
def test_a_token_of_the_environment_is_looked_at_too(hub, folder, monkeypatch, sleeps, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PushError, match="a token must be one word of ASCII") as raised:
        push_folder(folder, "user/run")
    assert token not in str(raised.value)
    assert (hub.requests, sleeps) == ([], [])
    push_folder(folder, "user/run", token=OTHER_TOKEN)


@pytest.mark.parametrize("shown", ["{}", "b'Bearer {}\\\\n'", "https://user:{}@host/", "token={}&x"])
@pytest.mark.parametrize("secret", [OTHER_TOKEN, "odd/token+of=signs%", 'with"quotes\\and', "hf_x"])
def test_a_token_is_masked_in_each_form_and_blanks_never(secret, shown):
    for form in {secret, quote(secret, safe=""), repr(secret)[1:-1]}:
        text = f"it failed: {shown.format(form)} at all"
        assert without_tokens(text, {secret + "\n", "", " "}) == text.replace(form, "<TOKEN>")
    assert without_tokens("an x of hf_xet", {"x", "hf_x", ""}) == "an <TOKEN> of hf_xet"


@pytest.mark.parametrize(
    ("kind", "again"),
    [
        ("LocalProtocolError", False),
        ("UnsupportedProtocol", False),
        ("TooManyRedirects", False),
        ("ConnectError", True),
        ("ReadTimeout", True),
        ("RemoteProtocolError", True),
    ],
)
def test_what_can_never_pass_is_not_tried_again(hub, folder, sleeps, monkeypatch, kind, again):
    """Errors of the client itself, before or without an answer."""
    library = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    error = getattr(library, kind)("no way")
    assert is_transient(error) == again
    wrapped = RuntimeError("of the client")
    wrapped.__cause__ = error
    assert is_transient(wrapped) == again

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_sai.upload.HfApi.model_info", fails)
    with pytest.raises(PushError, match=kind):
        push_folder(folder, "user/run", token=TOKEN)
    assert len(sleeps) == (3 if again else 0)


def test_a_certificate_that_is_none_is_not_tried_again():
    library = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    error = library.ConnectError("failed")
    error.__cause__ = RuntimeError("of the layer below")
    error.__cause__.__context__ = ssl.SSLCertVerificationError("self-signed")
    assert not is_transient(error)


@pytest.mark.parametrize(("stage", "status"), [("info", 401), ("create", 403), ("create", 404), ("commit", 400)])
def test_an_answer_that_stays_is_asked_for_once(hub, folder, sleeps, stage, status):
    hub.fail(stage, status, FOREVER)
    with pytest.raises(PushError, match=f"{status}"):
        push_folder(folder, "user/run", token=TOKEN)
    assert sleeps == []


@pytest.mark.parametrize("name", ["a/b/c", "", "user/", "/run", "user/a b", "user/x.git", "-x", "user/a..b"])
def test_a_name_that_can_be_none_is_an_error_at_once(hub, folder, name):
    with pytest.raises(PushError, match="a repository is user/name, but the one given is") as raised:
        push_folder(folder, name, token=TOKEN)
    assert "hf-sai push" not in str(raised.value)
    assert hub.requests == []


@pytest.mark.parametrize("header", ["base_model: /a/b/c", "base_model: [a/b, 5 a b]", "x: 1"])
def test_a_card_that_the_hub_refuses_keeps_nothing_else_back(hub, folder, caplog, header):
    (folder / "README.md").write_text(f"---\n{header}\n---\n# mine\n")
    if header == "x: 1":  # for a reason that only the Hub knows
        hub.fail("validate", 400, FOREVER)
    assert push_folder(folder, "user/run", token=TOKEN) is not None
    assert sorted(hub.repos["user/run"].tree()) == [name for name in PUSHED if name != "README.md"]
    assert "README.md is not pushed to user/run, the other files are: the Hub refuses it (" in caplog.text
    for name in PUSHED[2:]:
        (folder / name).unlink()
    with pytest.raises(PushError, match=r"README\.md, which can't be pushed, is all that there is"):
        push_folder(folder, "user/run", token=TOKEN)


def invoked(*words):
    return CliRunner().invoke(app, ["push", *map(str, words)])


def test_a_dry_run_checks_what_a_push_would_check(hub, tmp_path, caplog):
    """Errors end with 1; what is only odd is a warning, and with --strict an error before anything is sent."""
    folder = make_folder(tmp_path / "out")
    good = ["--token", TOKEN, "--dry-run"]
    assert (invoked(folder, "user/run", *good).exit_code, caplog.text) == (0, "")
    assert invoked(folder, "user/run", *good, "--strict").exit_code == 0
    wrong = {
        "not there": (tmp_path / "typo", "user/run", *good),
        "a/b/c": (folder, "a/b/c", *good),
        "is empty": (folder, "user/run", "--dry-run", "--token", ""),
        "goes against main": (folder, "user/run", *good, "--create-pr", "--revision", "v1"),
    }
    for told, words in wrong.items():
        result = invoked(*words)
        assert (result.exit_code, told in result.output) == (1, True), told
    (folder / "notes.txt").write_text(TOKEN)
    result = invoked(folder, "user/run", *good)
    assert result.exit_code == 1
    assert "notes.txt does" in result.output
    assert TOKEN not in result.output
    assert hub.requests == []


ODD_FOLDERS = {
    "holds neither a model nor a report": {"a.txt": b"a"},
    "README.md is left out of a push": {"config.json": b"{}", "README.md": b"---\na: b: c\n---\n"},
    "must be UTF-8, but line 2 holds the byte 0xe9": {"model.safetensors": b"", "README.md": b"# x\ncaf\xe9"},
}


@pytest.mark.parametrize("told", ODD_FOLDERS)
def test_what_is_odd_is_said_and_strict_ends_there(hub, tmp_path, caplog, told):
    for name, content in ODD_FOLDERS[told].items():
        (tmp_path / name).write_bytes(content)
    assert invoked(tmp_path, "user/run", "--token", TOKEN, "--dry-run").exit_code == 0
    assert told in caplog.text
    assert invoked(tmp_path, "user/run", "--token", TOKEN, "--strict").exit_code == 1
    assert hub.requests == []
    assert invoked(tmp_path, "user/run", "--token", TOKEN).exit_code == 0
    assert set(hub.repos["user/run"].tree()) == {".gitattributes", *ODD_FOLDERS[told]} - {"README.md"}


def test_a_dry_run_without_token_or_hub_says_so(folder, caplog, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert invoked(folder, "user/run", "--dry-run").exit_code == 0
    assert "a push needs a token, but there is none; run hf auth login, or set HF_TOKEN" in caplog.text
    assert "HF_HUB_OFFLINE is set; unset it" in caplog.text
    result = invoked(folder, "user/run", "--token", TOKEN)
    assert result.exit_code == 1
    assert "offline mode is enabled" in result.output
