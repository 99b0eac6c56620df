"""Questions to the Hub that always end: each has a limit in seconds and, where it fails, a reason in plain words."""

import dataclasses
import glob
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lib.endpoint import is_official
from lib.hub_cache import Repo
from lib.redaction import redact

Result = TypeVar("Result")
STALL_SECONDS = 30.0
"""A download that brings no byte for so long is given up."""


@dataclasses.dataclass(eq=False)
class Fault(Exception):
    """Why the Hub, or a mirror, did not give what was asked; `kind` is one word, `text` a sentence about the server."""

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """What the Hub has under a revision: the commit, and {name: {size, blob_id, lfs_sha256?, lfs_size?}}."""

    commit: str
    tree: dict[str, dict]


def bounded(call: Callable[[], Result], is_late: Callable[[], bool]) -> Result:
    """Run `call` in a thread of its own and give up on it as soon as `is_late`: no name look-up or server can stall us.

    Raises what `call` raises, or TimeoutError. A call given up on is left behind; it ends with the process.
    """
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["result"] = call()
        except BaseException as error:  # handed to the caller below
            box["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        if thread.is_alive() and is_late():
            raise TimeoutError
    if "error" in box:
        raise box["error"]
    return box["result"]


def ask(repo: Repo, revision: str, endpoint: str, limit: float, send_token: bool = False) -> Listing | Fault:
    """Commit and files of a revision, or why the server did not tell, within `limit` seconds."""
    started = time.monotonic()
    try:
        return bounded(
            lambda: request_listing(repo, revision, endpoint, limit, send_token),
            lambda: time.monotonic() - started > limit,
        )
    except Exception as error:  # all that a network can do ends in a sentence
        return explain(error, repo, revision, endpoint, limit)


def ask_all(
    questions: Sequence[tuple[Repo, str]], endpoint: str, limit: float, send_token: bool = False
) -> list[Listing | Fault]:
    """`ask` for several revisions at once: together they take no longer than one."""
    answers: list[Any] = [None] * len(questions)

    def work(index: int) -> None:
        answers[index] = ask(*questions[index], endpoint, limit, send_token)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def request_listing(repo: Repo, revision: str, endpoint: str, limit: float, send_token: bool) -> Listing:
    """One request for commit, sizes and hashes of all files; raises what httpx2 and huggingface_hub raise."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token_rule(endpoint, send_token))
    info: Any = api.repo_info(
        repo.repo_id, revision=revision, repo_type=repo.repo_type, timeout=limit, files_metadata=True
    )
    tree = {}
    for file in info.siblings or []:
        lfs = {"lfs_sha256": file.lfs["sha256"], "lfs_size": file.lfs["size"]} if file.lfs else {}
        tree[file.rfilename] = {"size": file.size, "blob_id": file.blob_id} | lfs
    if not info.sha or any(entry["size"] is None or entry["blob_id"] is None for entry in tree.values()):
        raise ValueError("no commit or no sizes in the answer")
    return Listing(info.sha, tree)


def token_rule(endpoint: str, send_token: bool) -> bool | None:
    """None: the user's token where there is one. False: none, whatever the environment says."""
    return None if send_token or is_official(endpoint) else False


def explain(error: Exception, repo: Repo, revision: str, endpoint: str, limit: float) -> Fault:
    """A fault of the network or the server as one sentence about it."""
    import httpx2
    from huggingface_hub import errors

    server, status = f"the Hub at {redact(endpoint)}", getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return Fault("silent", f"{server} did not answer within {limit:g} seconds (--hub_timeout)")
    if isinstance(error, httpx2.ProxyError):
        return Fault("proxy", f"the proxy on the way to {endpoint} refused: {first_line(error)}")
    if isinstance(error, httpx2.ConnectError):
        return explain_connect(error, server)
    if isinstance(error, errors.GatedRepoError):
        return Fault("gated", f"{server} gives {repo} only to users who accepted its terms")
    if isinstance(error, errors.RevisionNotFoundError):
        return Fault("revision", f"{server} has {repo}, but no revision {revision}")
    if status == 401:
        return Fault(
            "unauthorized", f"{server} answered 401: {repo} does not exist there, or is private and needs a token"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return Fault("unknown", f"{server} has no {repo}")
    if status == 403:
        return Fault("forbidden", f"{server} answered 403: access to {repo} is forbidden")
    if status is not None and status >= 500:
        return Fault("broken", f"{server} answered {status}: it is out of order for now")
    if status == 429:
        return Fault("busy", f"{server} answered 429: too many requests for now")
    if isinstance(error, ValueError | TypeError | KeyError | AttributeError):
        return Fault("foreign", f"{server} answered with something else, such as the page of a login portal or a proxy")
    return Fault("network", f"{server} could not be asked: {first_line(error)}")


def explain_connect(error: Exception, server: str) -> Fault:
    reason = first_line(error)
    if any(word in reason for word in ("Name or service", "name resolution", "getaddrinfo", "nodename")):
        return Fault("dns", f"{server} is not known to the name server ({reason})")
    if "CERTIFICATE" in reason.upper():
        return Fault("certificate", f"{server} shows a certificate that is not trusted ({reason})")
    if "refused" in reason:
        return Fault("refused", f"{server} refuses the connection")
    return Fault("network", f"{server} cannot be reached ({reason})")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return redact(lines[0]) if lines else type(error).__name__


def download(
    repo: Repo, listing: Listing, names: Sequence[str], folder: Path, endpoint: str, send_token: bool = False
) -> None:
    """Bring files of a commit into `folder`, with what huggingface_hub notes about them.

    Raises Fault when the server refuses, breaks off, or brings no byte for STALL_SECONDS.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging as hub_logging

    last = [time.monotonic()]

    def work() -> None:
        snapshot_download(
            repo.repo_id,
            repo_type=repo.repo_type,
            revision=listing.commit,
            local_dir=folder,
            cache_dir=folder / ".cache",
            allow_patterns=[glob.escape(name) for name in names],
            endpoint=endpoint,
            token=token_rule(endpoint, send_token),
            tqdm_class=pulse(last),
            max_workers=4,
        )

    hub_logging.set_verbosity_error()
    try:
        bounded(work, lambda: time.monotonic() - last[0] > STALL_SECONDS)
    except TimeoutError:
        raise Fault("stalled", f"the Hub at {redact(endpoint)} sent nothing for {STALL_SECONDS:g} seconds") from None
    except Exception as error:
        raise explain_download(error, repo, listing.commit, endpoint) from error


def pulse(last: list[float]) -> Any:
    """The library's progress bar, shown on a terminal only, that keeps in `last` when something came."""
    from huggingface_hub.utils import tqdm

    class Pulse(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings | {"disable": settings.get("disable") or None})

        def update(self, n: float | None = 1) -> bool | None:
            last[0] = time.monotonic()
            return super().update(n)

    return Pulse


def explain_download(error: Exception, repo: Repo, commit: str, endpoint: str) -> Fault:
    """A download that broke off as one sentence; files cut by the server have one of their own."""
    if isinstance(error, OSError) and ("Consistency check" in str(error) or "incomplete" in str(error)):
        return Fault("truncated", f"the Hub at {redact(endpoint)} sent a file that is cut off: {first_line(error)}")
    if type(error).__name__ == "RemoteProtocolError":
        return Fault("truncated", f"the Hub at {redact(endpoint)} broke off in the middle of a file, again and again")
    if type(error).__name__ in ("FileMetadataError", "LocalEntryNotFoundError") and "X-Repo-Commit" in chain(error):
        return Fault("foreign", f"the Hub at {redact(endpoint)} answered with a web page in the place of a file")
    cause = error.__cause__ if type(error).__name__ == "LocalEntryNotFoundError" else None
    return explain(cause if isinstance(cause, Exception) else error, repo, commit, endpoint, STALL_SECONDS)


def chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
