"""
A Hub on the loopback interface: enough of its HTTP API for the real client, with faults on request.

Its answers follow what huggingface_hub 2.4.0 sends and reads (constraints.txt); `make test-oldest` puts the same tests
through the client that transformers 5.2 takes. They are no recordings: where the real Hub differs, this file is wrong.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK


USER = "user"
LARGE = (".safetensors", ".bin", ".png", ".pt", ".pth")  # what the Hub's .gitattributes sends through LFS
REPO_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
HUB_STAGES = ("whoami", "info", "create", "branch", "validate", "preupload", "lfs_batch", "lfs_upload", "lfs_verify")
STAGES = (*HUB_STAGES, "commit", "resolve")


@dataclass
class Repo:
    """Commits as whole trees; a branch is a list of commits, the last is its head."""

    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    messages: dict = field(default_factory=dict)

    def add(self, branch, files, message="", parent=None):
        """A commit of these changes (`None` deletes) on top of a branch, which is made where it is missing."""
        tree = dict(self.tree(parent or branch) or {})
        for name, content in files.items():
            tree.pop(name, None)
            if content is not None:
                tree[name] = content
        oid = uuid.uuid4().hex + "0" * 8  # of its own: a client keeps the files of a commit for ever
        self.commits[oid] = tree
        self.messages[oid] = message
        self.branches.setdefault(branch, []).append(oid)
        return oid

    def head(self, revision):
        """The commit that a branch or a commit's id means; `None` where there is none."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.commits else None

    def tree(self, revision="main"):
        """Files of a revision, `{path: bytes}`; `None` where there is no such revision."""
        return self.commits.get(self.head(revision))


@dataclass
class Fault:
    """What goes wrong: an HTTP status, `"reset"`, `"lost"` (done, but no answer), `"slow"` or `"truncated"`."""

    stage: str
    kind: int | str
    times: int
    retry_after: int | None


class Answer(Exception):
    """Ends a request with this status."""

    def __init__(self, status, content=None, code=None, **headers):
        super().__init__(status)
        self.status, self.content, self.code, self.headers = status, content, code, headers


class Hub:
    """
    The state of a loopback Hub.

    `repos` holds what was pushed, `requests` every request as `(method, path, headers, body)`, `counts` the requests
    by stage. [`Hub.fail`] breaks the next requests of a stage.
    """

    def __init__(self):
        self.repos, self.large, self.requests, self.faults = {}, {}, [], []
        self.counts = dict.fromkeys(STAGES, 0)
        self.seconds_slow = 30.0
        self.over = threading.Event()
        self.lock = threading.RLock()
        self.endpoint = ""

    def add(self, repo_id, files, private=False, branch="main"):
        """Puts files into a repository, which is made where it is missing."""
        return self.repos.setdefault(repo_id, Repo(private)).add(branch, files)

    def fail(self, stage, kind, times=1, retry_after=None):
        """The next `times` requests of a stage end in a fault."""
        self.faults.append(Fault(stage, kind, times, retry_after))

    def heal(self):
        """No fault any more."""
        self.faults.clear()

    def take_fault(self, stage):
        with self.lock:
            for fault in self.faults:
                if fault.stage == stage and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def recorded(self):
        """All that was received but the Authorization header, as bytes."""
        parts = []
        for method, path, headers, body in self.requests:
            kept = [f"{name}: {value}" for name, value in headers.items() if name.lower() != "authorization"]
            parts += ["\n".join([f"{method} {path}", *kept]).encode(), body]
            for line in body.splitlines():  # a commit's files are in base64
                with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
                    parts.append(base64.b64decode(json.loads(line)["value"]["content"]))
        return b"\n".join(parts)

    # One method per stage: takes the match of its route, the query and the body; returns what is sent as JSON.

    def whoami(self, match, query, body):
        return {"name": USER, "type": "user", "orgs": []}

    def create(self, match, query, body):
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        content = {"url": f"{self.endpoint}/{repo_id}", "id": repo_id}
        if repo_id in self.repos:
            raise Answer(409, {**content, "error": "You already created this model repo"})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.add(repo_id, {".gitattributes": b""}, private)
        return content

    def info(self, match, query, body):
        repo = self.repo(match)
        head = self.head(repo, match["revision"] or "main")
        files = [{"rfilename": name} for name in repo.commits[head]]
        return {"id": match["repo"], "sha": head, "private": repo.private, "tags": [], "siblings": files}

    def tree(self, match, query, body):
        repo = self.repo(match)
        files = repo.commits[self.head(repo, match["revision"])]
        return [{"type": "file", "path": name, "oid": blob(each), "size": len(each)} for name, each in files.items()]

    def branch(self, match, query, body):
        repo = self.repo(match)
        if match["revision"] in repo.branches:
            raise Answer(409, {"error": "Reference already exists"})
        repo.branches[match["revision"]] = list(repo.branches["main"])
        return {}

    def validate(self, match, query, body):
        header = REGEX_YAML_BLOCK.search(json.loads(body)["content"].removeprefix("\ufeff"))
        try:
            data = yaml.safe_load(header[2]) or {} if header else {}
            assert isinstance(data, dict), "the header is no mapping"
        except (yaml.YAMLError, AssertionError) as error:
            raise Answer(400, {"errors": [{"message": str(error)}], "warnings": []}) from None
        models = data.get("base_model") or []
        bad = [each for each in (models if isinstance(models, list) else [models]) if not REPO_ID.match(str(each))]
        if bad:
            raise Answer(400, {"errors": [{"message": f"base_model {bad} is no model id"}], "warnings": []})
        return {"errors": [], "warnings": []}

    def preupload(self, match, query, body):
        repo = self.repo(match)
        tree = repo.commits[self.head(repo, match["revision"])]
        answers = []
        for each in json.loads(body)["files"]:
            name = each["path"]
            mode = "lfs" if name.endswith(LARGE) else "regular"
            oid = None if name not in tree else sha256(tree[name]) if mode == "lfs" else blob(tree[name])
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, match, query, body):
        self.repo(match)
        objects = []
        for each in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.endpoint}/lfs/{each['oid']}"},
                "verify": {"href": f"{self.endpoint}/{match['repo']}/lfs-verify"},
            }
            known = each["oid"] in self.large
            objects.append({"oid": each["oid"], "size": each["size"], **({} if known else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, match, query, body):
        if sha256(body) != match["oid"]:
            raise Answer(400, {"error": "content does not match its id"})
        self.large[match["oid"]] = body
        return {}

    def lfs_verify(self, match, query, body):
        if json.loads(body)["oid"] not in self.large:
            raise Answer(404, {"error": "no such object"})
        return {}

    def commit(self, match, query, body):
        repo = self.repo(match)
        head = self.head(repo, match["revision"])
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", head) != head:
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise Answer(400, {"error": f"LFS pointer of {value['path']} points to nothing"})
                changes[value["path"]] = self.large[value["oid"]]
            else:
                changes[value["path"]] = None
        pull = "create_pr=1" in query
        target = f"refs/pr/{sum(name.startswith('refs/pr') for name in repo.branches) + 1}" if pull else None
        oid = repo.add(target or match["revision"], changes, header["value"]["summary"], parent=head)
        answer = {"commitUrl": f"{self.endpoint}/{match['repo']}/commit/{oid}", "commitOid": oid}
        number = (target or "").rpartition("/")[2]
        return {
            **answer,
            **({"pullRequestUrl": f"{self.endpoint}/{match['repo']}/discussions/{number}"} if pull else {}),
        }

    def resolve(self, match, query, body):
        repo = self.repo(match)
        head = self.head(repo, match["revision"])
        content = repo.commits[head].get(match["name"])
        if content is None:
            raise Answer(404, code="EntryNotFound", **{"X-Repo-Commit": head})
        raise Answer(200, content, ETag=f'"{sha256(content)}"', **{"X-Repo-Commit": head})

    def repo(self, match):
        repo = self.repos.get(match["repo"])
        if repo is None or (repo.private and not match["token"]):
            raise Answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        return repo

    def head(self, repo, revision):
        head = repo.head(revision)
        if head is None:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, code="RevisionNotFound")
        return head


_REPO = r"(?P<repo>[^/]+/[^/]+)"
# (stage, method, path, handler where it is not called like the stage)
ROUTES = [
    ("whoami", "GET", r"/api/whoami-v2", None),
    ("create", "POST", r"/api/repos/create", None),
    ("validate", "POST", r"/api/validate-yaml", None),
    ("preupload", "POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", None),
    ("commit", "POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", None),
    ("branch", "POST", rf"/api/models/{_REPO}/branch/(?P<revision>[^/]+)", None),
    ("info", "GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/.*)?", "tree"),
    ("info", "GET", rf"/api/models/{_REPO}(?:/revision/(?P<revision>[^/]+))?", None),
    ("lfs_batch", "POST", rf"/{_REPO}\.git/info/lfs/objects/batch", None),
    ("lfs_verify", "POST", rf"/{_REPO}/lfs-verify", None),
    ("lfs_upload", "PUT", r"/lfs/(?P<oid>\w+)", None),
    ("resolve", "GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", None),
]
WRITES = ("POST", "PUT")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def blob(content):
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        path, _, query = self.path.partition("?")
        method = "GET" if self.command == "HEAD" else self.command
        found = ((each, re.fullmatch(each[2], path)) for each in ROUTES if each[1] == method)
        (stage, _, _, name), match = next((pair for pair in found if pair[1]), ((None,) * 4, None))
        self.fault = self.hub.take_fault(stage)
        size = int(self.headers.get("Content-Length") or 0)
        if self.fault is not None and self.fault.kind == "reset":
            self.rfile.read(size // 2)
            self.reset()
            return
        body = self.rfile.read(size)
        self.hub.requests.append((self.command, self.path, dict(self.headers), body))
        if stage is None:
            self.send(404, {"error": f"no route for {self.command} {path}"}, "EntryNotFound")
            return
        self.hub.counts[stage] += 1
        if self.fault is not None and isinstance(self.fault.kind, int):
            wait = {} if self.fault.retry_after is None else {"Retry-After": str(self.fault.retry_after)}
            self.send(self.fault.kind, {"error": f"fault {self.fault.kind}"}, **wait)
            return
        if self.fault is not None and self.fault.kind == "slow":
            self.hub.over.wait(self.hub.seconds_slow)
        self.answer(getattr(self.hub, name or stage), stage, match, query, body)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, handler, stage, match, query, body):
        groups = {key: None if value is None else unquote(value) for key, value in match.groupdict().items()}
        groups["token"] = self.headers.get("Authorization")
        if stage not in ("info", "resolve", "lfs_upload") and not groups["token"]:
            self.send(401, {"error": "Invalid username or password."})
            return
        try:
            with self.hub.lock:
                content, status, code, headers = handler(groups, query, body), 200, None, {}
        except Answer as answer:
            content, status, code, headers = answer.content, answer.status, answer.code, answer.headers
        self.send(status, content, code, **headers)

    def send(self, status, content=None, code=None, **headers):
        kind = self.fault.kind if self.fault is not None else None
        if kind == "lost":
            self.reset()
            return
        if not isinstance(content, bytes):
            content = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, **({"X-Error-Code": code} if code else {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # the client may have given up
                self.wfile.write(content[: len(content) // 2] if kind == "truncated" else content)

    def reset(self):
        """The client sees "connection reset by peer"."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *args):
        pass

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request):
        with contextlib.suppress(OSError):
            super().shutdown_request(request)

    def handle_error(self, request, client_address):
        pass  # a connection that was reset


@contextlib.contextmanager
def loopback_hub():
    """Serves an empty [`Hub`] and yields it; its address is `hub.endpoint`."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def connected(hub, monkeypatch):
    """While it is open, huggingface_hub in this process talks to the loopback Hub over plain HTTP."""
    from huggingface_hub import constants

    template = hub.endpoint + urlsplit(constants.HUGGINGFACE_CO_URL_TEMPLATE).path
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        yield


def online(hub, home, **changed):
    """The environment of a process that talks to the loopback Hub, with an empty cache of its own."""
    import os

    dropped = ("HF_HUB_CACHE", "HF_DATASETS_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    flags = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
    return {**kept, **flags, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), **changed}


def wait_until(condition, seconds=60.0):
    """Waits for what another thread will do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
