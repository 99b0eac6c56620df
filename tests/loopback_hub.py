"""A Hub on the loopback interface: serves folders as model and data set repositories, as far as loading needs it.

ROOT/models/NAME/... and ROOT/datasets/NAMESPACE/NAME/... are repositories; every file is on the one branch `main`.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "1" * 40


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    root: Path
    requests: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(payload=self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, body: bool = True, payload: bytes = b"") -> None:
        path = unquote(urlparse(self.path).path)
        self.requests.append(path)
        if path.startswith("/api/"):
            _, _, kind, *rest = path.split("/")
            repository, verb, tail = self.find(kind, rest)
            if repository is None:
                return self.fail("RepoNotFound")
            return self.api(kind, repository, verb, tail, payload)
        kind, parts = "models", path.strip("/").split("/")
        if parts[0] == "datasets":
            kind, parts = "datasets", parts[1:]
        repository, verb, tail = self.find(kind, parts)
        if repository is None:
            return self.fail("RepoNotFound")
        file = repository.joinpath(*tail[1:])
        if verb != "resolve" or not file.is_file():
            return self.fail("EntryNotFound")
        return self.send(file.read_bytes(), "application/octet-stream", body)

    def find(self, kind: str, parts: list[str]) -> tuple[Path | None, str, list[str]]:
        """The repository that a path begins with, the next word and the rest."""
        for length in (2, 1):
            folder = self.root.joinpath(kind, *parts[:length])
            if len(parts) >= length and folder.is_dir() and any(item.is_file() for item in folder.iterdir()):
                return folder, (parts[length : length + 1] or [""])[0], parts[length + 1 :]
        return None, "", []

    def api(self, kind: str, repository: Path, verb: str, tail: list[str], payload: bytes) -> None:
        files = sorted(path for path in repository.rglob("*") if path.is_file())
        entries = [
            {
                "type": "file",
                "path": str(f.relative_to(repository)),
                "size": f.stat().st_size,
                "oid": git_hash(f.read_bytes()),
            }
            for f in files
        ]
        if verb == "tree":
            below = "/".join(tail[1:])
            entries = [entry for entry in entries if entry["path"].startswith(below)]
            return self.send_json(entries) if entries else self.fail("EntryNotFound")
        if verb == "paths-info":
            wanted = json.loads(payload)["paths"] if payload.startswith(b"{") else []
            return self.send_json([entry for entry in entries if entry["path"] in wanted])
        name = str(repository.relative_to(self.root / kind))
        record = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
        return self.send_json(record | {"siblings": [{"rfilename": entry["path"]} for entry in entries]})

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), "application/json")

    def send(self, data: bytes, kind: str, body: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{git_hash(data)}"')
        self.end_headers()
        if body:
            self.wfile.write(data)

    def fail(self, reason: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", reason)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def loopback_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root`; gives the endpoint and the list of paths asked for so far."""
    requests: list[str] = []
    handler = type("Handler", (Handler,), {"root": root, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join(timeout=10)
