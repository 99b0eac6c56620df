"""Files of the Hub or a mirror, brought to a folder: over slow and broken lines too, and never without an end."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.errors import first_line, redact
from lib.hub.cache.files import damage
from lib.hub.cache.layout import Repo, cache_root
from lib.hub.client import Fault, Listing, at_once, bounded, explain, token_rule

STALL_SECONDS = 30.0
"""A download that brings no byte for so long is given up."""
PIECE = 2**16
"""Bytes in which a file grows. In the library's pieces of 10 MiB a slow line looks dead, and a broken one loses them."""


class Pulse:
    """Takes the place of the library's progress bar for each file: one bar for all, and when something last came."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.last = bar, time.monotonic()

    def __call__(self, **_: Any) -> "Pulse":
        return self

    def __enter__(self) -> "Pulse":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, size: int) -> None:
        self.last = time.monotonic()
        self.bar.update(size)


def download(
    repo: Repo, listing: Listing, names: Sequence[str], folder: Path, endpoint: str, send_token: bool = False
) -> None:
    """Bring files of a commit into `folder`; what an earlier call has left there, parts of files too, is not brought again.

    Raises Fault when the server refuses, breaks off, or brings no byte for STALL_SECONDS, and when the disk is full.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, tqdm
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    constants.DOWNLOAD_CHUNK_SIZE = PIECE
    headers = build_hf_headers(token=token_rule(endpoint, send_token))
    todo = [name for name in names if not (folder / name).is_file()]
    parts = [folder / f"{name}.incomplete" for name in todo]
    size = sum(listing.tree[name]["size"] for name in todo)
    size -= sum(part.stat().st_size for part in parts if part.is_file())
    with tqdm(desc=repo.repo_id, total=size, unit="B", unit_scale=True, disable=None) as bar:  # on a terminal only
        pulse = Pulse(bar)

        def bring(name: str) -> None:
            url = hf_hub_url(repo.repo_id, name, repo_type=repo.repo_type, revision=listing.commit, endpoint=endpoint)
            bring_file(url, folder / name, listing.tree[name]["size"], headers, pulse)

        try:
            bounded(lambda: at_once(bring, todo, 4), lambda: time.monotonic() - pulse.last > STALL_SECONDS)
        except TimeoutError:
            text = f"the Hub at {redact(endpoint)} sent nothing for {STALL_SECONDS:g} seconds"
            raise Fault("stalled", text) from None
        except Exception as error:
            raise explain_download(error, repo, listing.commit, endpoint) from error


def bring_file(url: str, path: Path, size: int, headers: dict[str, str], pulse: Pulse) -> None:
    """Bring one file of `size` bytes, from where its part ends. Raises what the library raises, and Fault for other sizes."""
    import httpx2
    from huggingface_hub.file_download import http_get

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.incomplete")
    before = -1
    while True:
        with part.open("ab") as file:
            there = file.tell()
            try:
                http_get(
                    url,
                    file,
                    resume_size=there,
                    headers=headers,
                    expected_size=size,
                    tqdm_class=pulse,  # type: ignore[arg-type]
                )
                break
            except httpx2.NetworkError:  # reset in the middle: again, as long as more comes of it
                if file.tell() <= max(before, there):
                    raise
                before = there
            except OSError as error:
                if "Consistency check" not in str(error):
                    raise
                file.flush()
                fault = damage(part, path.name) or f"is cut off: {part.stat().st_size:,} of {size:,} bytes"
                part.unlink()
                raise Fault("altered", f"sent a file that is not the listed one: {path.name} {fault}") from error
    part.rename(path)


def explain_download(error: Exception, repo: Repo, commit: str, endpoint: str) -> Fault:
    """A download that broke off as one sentence; a full disk has one of its own."""
    server = f"the Hub at {redact(endpoint)}"
    if isinstance(error, Fault):
        return Fault(error.kind, f"{server} {error.text}")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return Fault("disk", f"the cache {cache_root()} cannot be written: {first_line(error)}")
    if type(error).__name__ in ("RemoteProtocolError", "ReadError"):
        return Fault("broken_off", f"{server} broke off in the middle of a file, again and again")
    return explain(error, repo, commit, endpoint, STALL_SECONDS)
