"""A Hub on the loopback interface: serves folders as model and data set repositories, and fails in chosen ways.

ROOT/models/NAME/... and ROOT/datasets/NAMESPACE/NAME/... are repositories; every file is on the one branch `main`, and
the commit is a hash of all contents. Files with an LFS suffix are in LFS.
"""

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

LFS = (".safetensors", ".bin", ".parquet")
FAULTS = (
    *("hang", "slow", "401", "403", "429", "503", "html", "portal", "gated"),
    *("broken_off", "short", "flipped", "pointer"),
)


@dataclasses.dataclass
class Hub:
    """A running server; `fault` may be set at any time, with `on_files` it applies to downloads of files only.

    `moved` redirects from old names of repositories to new ones, `elsewhere` redirects downloads of LFS files to another
    server. `rate` is in bytes per second.
    """

    root: Path
    endpoint: str = ""
    fault: str | None = None
    on_files: bool = False
    commit: str | None = None
    moved: dict[str, str] = dataclasses.field(default_factory=dict)
    rate: int | None = None
    elsewhere: str = ""
    ranges: list[str] = dataclasses.field(default_factory=list)
    requests: list[str] = dataclasses.field(default_factory=list)
    tokens: list[str] = dataclasses.field(default_factory=list)
    closing: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __iter__(self) -> Iterator[object]:
        return iter((self.endpoint, self.requests))

    @property
    def downloads(self) -> list[str]:
        return [path for path in self.requests if "/resolve/" in path]


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer_of(data: bytes) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()


def repository_files(repository: Path) -> dict[str, bytes]:
    files = sorted(path for path in repository.rglob("*") if path.is_file())
    return {path.relative_to(repository).as_posix(): path.read_bytes() for path in files}


def commit_of(repository: Path) -> str:
    state = hashlib.sha1()
    for name, data in repository_files(repository).items():
        state.update(name.encode() + b"\0" + data)
    return state.hexdigest()


def blob_of(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith(LFS) else git_hash(data)


PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


class Handler(BaseHTTPRequestHandler):
    hub: Hub

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
        self.hub.requests.append(path)
        if path == "/login":
            return self.send(PAGE, {"Content-Type": "text/html"}, body)
        for old, new in self.hub.moved.items():
            if f"/{old}/" in f"{path}/":
                return self.redirect(path.replace(f"/{old}", f"/{new}", 1), 307)
        if "Authorization" in self.headers:
            self.hub.tokens.append(self.headers["Authorization"])
        if "Range" in self.headers:
            self.hub.ranges.append(self.headers["Range"])
        fault = self.hub.fault if "/resolve/" in path or not self.hub.on_files else None
        if fault and self.misbehave(fault, body):
            return None
        if path.startswith("/api/v1/models/"):
            return self.modelscope(path.removeprefix("/api/v1/models/"))
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
            return self.fail("EntryNotFound", commit_of(repository))
        if self.hub.elsewhere and file.name.endswith(LFS):
            return self.redirect(self.hub.elsewhere + path, 302)
        return self.send_file(file, repository, body, fault)

    def misbehave(self, fault: str, body: bool) -> bool:
        """Answer with a fault that does not depend on the request; False for the other faults."""
        if fault == "hang":
            self.hub.closing.wait(60)
        elif fault == "slow":  # bytes keep coming, but the answer is never complete in time
            for byte in b"HTTP/1.1 200 OK\r\n" + b"X-Filler: 1\r\n" * 100:
                if self.hub.closing.wait(0.1):
                    break
                with contextlib.suppress(OSError):
                    self.wfile.write(bytes([byte]))
        elif fault == "html":
            self.send(PAGE, {"Content-Type": "text/html"}, body)
        elif fault == "portal":
            self.redirect("/login", 302)
        elif fault == "gated":
            self.fail("GatedRepo", status=403)
        elif fault in ("401", "403", "429", "503"):
            self.fail("", status=int(fault))
        else:
            return False
        self.close_connection = True
        return True

    def find(self, kind: str, parts: list[str]) -> tuple[Path | None, str, list[str]]:
        """The repository at the start of a path, the next part, and the rest."""
        for length in (2, 1):
            folder = self.hub.root.joinpath(kind, *parts[:length])
            if len(parts) >= length and folder.is_dir() and any(item.is_file() for item in folder.iterdir()):
                return folder, (parts[length : length + 1] or [""])[0], parts[length + 1 :]
        return None, "", []

    def api(self, kind: str, repository: Path, verb: str, tail: list[str], payload: bytes) -> None:
        files, entries, siblings = repository_files(repository), [], []
        for name, data in files.items():
            entry: dict = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
            if name.endswith(LFS):
                lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entry |= {"oid": git_hash(pointer_of(data)), "lfs": lfs | {"oid": lfs["sha256"]}}
            entries.append(entry)
            more = {"lfs": entry["lfs"]} if "lfs" in entry else {}
            siblings.append({"rfilename": name, "size": len(data), "blobId": entry["oid"]} | more)
        commit = self.hub.commit or commit_of(repository)
        if verb == "tree":
            below = "/".join(tail[1:])
            entries = [entry for entry in entries if entry["path"].startswith(below)]
            return self.send_json(entries) if entries else self.fail("EntryNotFound", commit)
        if verb == "paths-info":
            wanted = json.loads(payload)["paths"] if payload.startswith(b"{") else []
            return self.send_json([entry for entry in entries if entry["path"] in wanted])
        if verb == "revision" and "/".join(tail) not in ("main", commit):
            return self.fail("RevisionNotFound")
        name = str(repository.relative_to(self.hub.root / kind))
        record = {"id": name, "sha": commit, "private": False, "gated": False, "disabled": False, "tags": []}
        return self.send_json(record | {"siblings": siblings})

    def modelscope(self, path: str) -> None:
        """The two requests of the package modelscope: the list of files, and a file."""
        repository, _, tail = self.find("models", path.split("/"))
        if repository is None:
            return self.fail("RepoNotFound")
        files = repository_files(repository)
        if tail != ["files"]:
            query = parse_qs(urlparse(self.path).query)
            return self.send(files[query["FilePath"][0]], {"Content-Type": "application/octet-stream"})
        rows = [
            {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        ]
        return self.send_json({"Code": 200, "Success": True, "Data": {"Files": rows}})

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, file: Path, repository: Path, body: bool, fault: str | None) -> None:
        data, name = file.read_bytes(), file.relative_to(repository).as_posix()
        headers = {"X-Repo-Commit": commit_of(repository), "ETag": f'"{blob_of(name, data)}"'}
        if name.endswith(LFS):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
            if fault == "flipped":
                data = data[:-1] + bytes([data[-1] ^ 1])
            elif fault == "short":
                data = data[: len(data) // 2]
                headers["X-Linked-Size"] = str(len(data))
            elif fault == "pointer":
                data = pointer_of(data)
                headers["X-Linked-Size"] = str(len(data))
            elif fault == "broken_off":
                return self.send(data[: len(data) // 2], headers | {"Content-Length": str(len(data))}, body)
        return self.send(data, headers, body)

    def send(self, data: bytes, headers: dict[str, str], body: bool = True) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}", **headers}
            data = data[start:]
        self.send_response(206 if start else 200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        rate = self.hub.rate or 0
        for begin in range(0, len(data) if body else 0, rate // 10 or len(data)):
            self.wfile.write(data[begin : begin + (rate // 10 or len(data))])
            if rate and self.hub.closing.wait(0.1):
                return

    def redirect(self, place: str, status: int) -> None:
        self.send_response(status)
        self.send_header("Location", place)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def fail(self, reason: str, commit: str = "", status: int = 404) -> None:
        self.send_response(status)
        for name, value in (("X-Error-Code", reason), ("X-Repo-Commit", commit)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


@contextlib.contextmanager
def loopback_hub(root: Path, fault: str | None = None, on_files: bool = False) -> Iterator[Hub]:
    """Serve the repositories in `root`; the Hub records all requests and tokens."""
    hub = Hub(root, fault=fault, on_files=on_files)
    server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def closed_endpoint() -> str:
    """An address that refuses connections."""
    with Server(("127.0.0.1", 0), Handler) as server:
        return f"http://127.0.0.1:{server.server_port}"
