"""Downloads to a folder: resumed after a broken connection, and given up when no byte arrives for a while."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.errors import first_line, redact
from lib.hub.cache.contents import file_damage
from lib.hub.cache.layout import Repo, cache_root
from lib.hub.client import Fault, Listing, call_with_timeout, explain_error, map_in_threads, token_for

STALL_SECONDS = 30.0
"""A download that receives no byte for so long is given up."""
CHUNK_SIZE = 2**16
"""Bytes that are written at once. With the library's 10 MiB a slow line looks dead, and a broken one loses up to 10 MiB."""


class SharedBar:
    """One progress bar for all files, and the time of the last byte; stands for `tqdm_class` in the library's downloads."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.last = bar, time.monotonic()

    def __call__(self, **_: Any) -> "SharedBar":
        return self

    def __enter__(self) -> "SharedBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, size: int) -> None:
        self.last = time.monotonic()
        self.bar.update(size)


def download(
    repo: Repo, listing: Listing, names: Sequence[str], folder: Path, endpoint: str, send_token: bool = False
) -> None:
    """Download files of a commit into `folder`, without what an earlier call left there, parts of files included.

    Raises Fault when the server refuses, breaks off, or sends no byte for STALL_SECONDS, and when the disk is full.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, tqdm
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_SIZE
    headers = build_hf_headers(token=token_for(endpoint, send_token))
    todo = [name for name in names if not (folder / name).is_file()]
    parts = [folder / f"{name}.incomplete" for name in todo]
    size = sum(listing.tree[name]["size"] for name in todo)
    size -= sum(part.stat().st_size for part in parts if part.is_file())
    server = f"the Hub at {redact(endpoint)}"
    with tqdm(desc=repo.repo_id, total=size, unit="B", unit_scale=True, disable=None) as bar:  # only on a terminal
        shared = SharedBar(bar)

        def fetch_one(name: str) -> None:
            url = hf_hub_url(repo.repo_id, name, repo_type=repo.repo_type, revision=listing.commit, endpoint=endpoint)
            download_file(url, folder / name, listing.tree[name]["size"], headers, shared)

        try:
            call_with_timeout(
                lambda: map_in_threads(fetch_one, todo, threads=4),
                is_late=lambda: time.monotonic() - shared.last > STALL_SECONDS,
            )
        except TimeoutError:
            raise Fault("stalled", f"{server} sent nothing for {STALL_SECONDS:g} seconds") from None
        except Fault as fault:
            raise Fault(fault.kind, f"{server} {fault.text}") from fault
        except Exception as error:
            if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
                text = f"the cache {cache_root()} cannot be written: {first_line(error)}"
                raise Fault("disk", text) from error
            if type(error).__name__ in ("RemoteProtocolError", "ReadError"):
                raise Fault("broken_off", f"{server} broke off in the middle of a file, several times") from error
            raise explain_error(error, repo, listing.commit, endpoint, STALL_SECONDS) from error


def download_file(url: str, path: Path, size: int, headers: dict[str, str], shared: SharedBar) -> None:
    """Download a file of `size` bytes, from the end of its part on.

    Raises what the library raises, and Fault when the server sends another number of bytes.
    """
    import httpx2
    from huggingface_hub.file_download import http_get

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.incomplete")
    before = -1
    while True:
        with part.open("ab") as file:
            there = file.tell()
            try:
                bar: Any = shared
                http_get(url, file, resume_size=there, headers=headers, expected_size=size, tqdm_class=bar)
                break
            except httpx2.NetworkError:  # a reset connection: again, as long as each attempt receives something
                if file.tell() <= max(before, there):
                    raise
                before = there
            except OSError as error:
                if "Consistency check" not in str(error):
                    raise
                file.flush()
                found = part.stat().st_size
                reason = file_damage(part, path.name) or f"has {found:,} of {size:,} bytes"
                part.unlink()
                raise Fault("altered", f"sent a file that is not the listed one: {path.name} {reason}") from error
    part.rename(path)
