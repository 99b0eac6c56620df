"""Questions to the Hub that always end: each has a limit in seconds and, where it fails, a reason in plain words."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lib.errors import first_line, redact
from lib.hub.cache.layout import COMMIT, Repo, check_tree
from lib.hub.endpoint import is_official, proxy_of

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    return at_once(lambda asked: ask(asked[0], asked[1], endpoint, limit, send_token), questions, len(questions))


def at_once(call: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """`call` for all items, by so many threads, none of which keeps a process that wants to end.

    Raises the first error; what has not begun by then is left.
    """
    results: list[Any] = [None] * len(items)
    waiting, errors = list(enumerate(items))[::-1], list[BaseException]()

    def work() -> None:
        while waiting and not errors:
            try:
                index, item = waiting.pop()
                results[index] = call(item)
            except BaseException as error:  # handed to the caller below
                errors.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return results


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
    if not COMMIT.fullmatch(info.sha or ""):
        raise ValueError("no commit in the answer")
    check_tree(tree)
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
    if isinstance(error, ImportError) and "socks" in str(error).lower():
        return Fault("socks", "a socks5:// proxy is set, for which a package is missing")
    if isinstance(error, httpx2.ProxyError) and (proxy := proxy_of(endpoint)):
        return Fault("proxy", f"the proxy {proxy} on the way to {redact(endpoint)} does not serve: {first_line(error)}")
    if isinstance(error, httpx2.ConnectError):
        return explain_connect(error, server, proxy_of(endpoint))
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


def explain_connect(error: Exception, server: str, proxy: str | None) -> Fault:
    reason = first_line(error)
    if proxy:
        return Fault("proxy", f"the proxy {proxy} on the way to {server} cannot be reached ({reason})")
    if any(word in reason for word in ("Name or service", "name resolution", "getaddrinfo", "nodename")):
        return Fault("dns", f"{server} is not known to the name server ({reason})")
    if "CERTIFICATE" in reason.upper():
        return Fault("certificate", f"{server} shows a certificate that is not trusted ({reason})")
    if "refused" in reason:
        return Fault("refused", f"{server} refuses the connection")
    return Fault("network", f"{server} cannot be reached ({reason})")
