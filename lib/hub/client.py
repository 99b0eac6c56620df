"""Requests to the Hub that always end: each has a limit in seconds and, where it fails, a reason in plain words."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lib.errors import first_line, redact
from lib.hub.cache.layout import COMMIT, Repo, check_tree, is_false_name
from lib.hub.endpoint import is_official, proxy_of

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(eq=False)
class Fault(Exception):
    """Why the Hub, or a mirror, did not answer a request; `kind` is one word, `text` a sentence about the server."""

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """What the Hub has under a revision: the commit, and {name: {size, blob_id, lfs_sha256?, lfs_size?}}."""

    commit: str
    tree: dict[str, dict]


def request_listings(
    questions: Sequence[tuple[Repo, str]], endpoint: str, limit: float, send_token: bool = False
) -> list[Listing | Fault]:
    """`request_listing` for several (repository, revision) at once; together they take at most `limit` seconds."""
    return map_in_threads(
        lambda asked: request_listing(*asked, endpoint, limit, send_token), questions, threads=len(questions)
    )


def request_listing(
    repo: Repo, revision: str, endpoint: str, limit: float, send_token: bool = False
) -> Listing | Fault:
    """Commit, sizes and hashes of a revision's files, by one request; after `limit` seconds, or on an error, a Fault."""

    def request() -> Any:
        from huggingface_hub import HfApi

        api, name = HfApi(endpoint=endpoint, token=token_for(endpoint, send_token)), repo.repo_id
        return api.repo_info(name, revision=revision, repo_type=repo.repo_type, timeout=limit, files_metadata=True)

    started = time.monotonic()
    try:
        info = call_with_timeout(request, lambda: time.monotonic() - started > limit)
        tree = {}
        for file in info.siblings or []:
            lfs = {"lfs_sha256": file.lfs["sha256"], "lfs_size": file.lfs["size"]} if file.lfs else {}
            tree[file.rfilename] = {"size": file.size, "blob_id": file.blob_id} | lfs
        if not COMMIT.fullmatch(info.sha or ""):
            raise ValueError("no commit in the answer")
        if is_false_name(revision, info.sha):
            raise ValueError("another commit in the answer than the one that was asked for")
        check_tree(tree)
        return Listing(info.sha, tree)
    except Exception as error:
        return explain_error(error, repo, revision, endpoint, limit)


def token_for(endpoint: str, send_token: bool) -> bool | None:
    """None: the user's token, if there is one. False: no token, whatever the environment says."""
    return None if send_token or is_official(endpoint) else False


def explain_error(error: Exception, repo: Repo, revision: str, endpoint: str, limit: float) -> Fault:
    """An error of the network or the server as one sentence about it."""
    import httpx2
    from huggingface_hub import errors

    server, proxy, reason = f"the Hub at {redact(endpoint)}", proxy_of(endpoint), first_line(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return Fault("silent", f"{server} did not answer within {limit:g} seconds (--hub_timeout)")
    if isinstance(error, ImportError) and "socks" in str(error).lower():
        return Fault("socks", "a socks5:// proxy is set, and the package that it needs is missing")
    if isinstance(error, httpx2.ProxyError) and proxy:
        return Fault("proxy", f"the proxy {proxy} for {redact(endpoint)} answered with an error: {reason}")
    if isinstance(error, httpx2.ConnectError) and proxy:
        return Fault("proxy", f"the proxy {proxy} for {server} cannot be reached ({reason})")
    if isinstance(error, httpx2.ConnectError):
        if any(word in reason for word in ("Name or service", "name resolution", "getaddrinfo", "nodename")):
            return Fault("dns", f"{server} is not known to the name server ({reason})")
        if "CERTIFICATE" in reason.upper():
            return Fault("certificate", f"{server} has a certificate that is not trusted ({reason})")
        if "refused" in reason:
            return Fault("refused", f"{server} refuses the connection")
        return Fault("network", f"{server} cannot be reached ({reason})")
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
        return Fault("broken", f"{server} answered {status}: it is out of service for now")
    if status == 429:
        return Fault("busy", f"{server} answered 429: too many requests for now")
    if isinstance(error, ValueError | TypeError | KeyError | AttributeError):
        return Fault(
            "foreign", f"{server} did not answer as a Hub does; the answer may be the page of a login portal or a proxy"
        )
    return Fault("network", f"{server} could not be asked: {reason}")


def call_with_timeout(call: Callable[[], Result], is_late: Callable[[], bool]) -> Result:
    """Run `call` in a thread and give up as soon as `is_late`, wherever it hangs, a name look-up included.

    Raises what `call` raises, or TimeoutError. The thread that was given up is a daemon: it ends with the process.
    """
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["result"] = call()
        except BaseException as error:  # raised again in the caller's thread
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


def map_in_threads(call: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """`call` for all items, in order, on `threads` daemon threads: unlike an executor's, they do not delay an exit.

    Raises the first error; items that have not begun by then are left out.
    """
    results: list[Any] = [None] * len(items)
    waiting, errors = list(enumerate(items))[::-1], list[BaseException]()

    def work() -> None:
        while waiting and not errors:
            try:
                index, item = waiting.pop()
                results[index] = call(item)
            except BaseException as error:  # raised again in the caller's thread
                errors.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return results
