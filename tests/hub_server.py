"""A Hub on the loopback interface, as far as a download of files needs one."""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def loopback_hub(files):
    """
    Serves `{(repo, revision, file name): bytes}`; yields the endpoint and a list of requests `(method, path, token)`.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            requests.append((self.command, self.path, self.headers.get("Authorization")))
            content = next(
                (
                    content
                    for (repo, revision, name), content in files.items()
                    if self.path.split("?")[0]
                    in (f"/{repo}/resolve/{revision}/{name}", f"/{repo}/resolve/{COMMIT}/{name}")
                ),
                None,
            )
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
