"""Into the cache: one writer at a time, what is on its way out of sight, and whole entries moved into place."""

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lib.errors import UserError
from lib.hub.cache.files import has_name
from lib.hub.cache.layout import Repo, cache_root, read_ref, snapshot_files
from lib.runtime.atomic import umask, write_atomically


class CacheError(UserError):
    """The cache cannot be written: no permission, or no space."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Raise CacheError for what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"the cache {cache_root()} cannot be written: {error}; set HF_HUB_CACHE to another") from error


def locks_folder(repo: Repo) -> Path:
    """Where the locks of a repository are, and what is on its way into the cache: no reader looks there."""
    return cache_root() / ".locks" / repo.folder_name


@contextlib.contextmanager
def lock_repo(repo: Repo, name: str = "entry", when_taken: str = "") -> Iterator[None]:
    """One writer at a time per repository; `when_taken` is said when another one has to be waited for.

    Raises CacheError when the cache cannot be written.
    """
    lock = hold(locks_folder(repo) / f"{name}.lock", 0)
    if lock is None:
        if when_taken:
            print(when_taken, file=sys.stderr, flush=True)
        lock = hold(locks_folder(repo) / f"{name}.lock", -1)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def hold(path: Path, seconds: float) -> FileLock | None:
    """The lock of a file, had within so many seconds (-1: waited for); else None. Raises CacheError."""
    with writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, mode=0o666 & ~umask())
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            return None
    return lock


@contextlib.contextmanager
def staging_folder(repo: Repo) -> Iterator[Path]:
    """A folder on the file system of the cache that no reader looks at; gone afterwards.

    So are those of processes that were killed: nobody holds the locks beside them.
    """
    parent = locks_folder(repo)
    for path in parent.glob("staging-*.lock"):
        if lock := hold(path, 0):
            remove_staged(path.with_suffix(""), lock)
    folder = parent / f"staging-{uuid.uuid4().hex[:12]}"
    lock = hold(folder.with_suffix(".lock"), -1)
    assert lock is not None
    try:
        with writing():
            folder.mkdir()
        yield folder
    finally:
        remove_staged(folder, lock)


def remove_staged(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".lock").unlink(missing_ok=True)
    lock.release()


def publish_entry(staged: Path, repo: Repo, move_ref: bool = False) -> None:
    """Move a whole entry, built in `staged` on the same file system, into the cache: contents, then snapshots, refs last.

    Call under `lock_repo`. Raises UserError, before anything is moved, when the cache holds other content under the
    same commit, or, without `move_ref`, the same ref of another commit.
    """
    folder = repo.folder
    check_same(staged, folder, repo, move_ref)
    for kind in ("blobs", "snapshots", "trees", ".no_exist"):
        (folder / kind).mkdir(parents=True, exist_ok=True) if (staged / kind).exists() else None
    for blob in sorted((staged / "blobs").glob("*")):
        # An equal name is equal content, unless what is there is damaged: the checked one replaces it.
        os.replace(blob, folder / "blobs" / blob.name)
    for kind in ("snapshots", ".no_exist"):
        for path in sorted((staged / kind).glob("*")):
            merge_folder(path, folder / kind / path.name)
    for path in sorted((staged / "trees").glob("*.json")):
        os.replace(path, folder / "trees" / path.name)
    for path in sorted(path for path in (staged / "refs").rglob("*") if path.is_file()):
        write_atomically(folder / "refs" / path.relative_to(staged / "refs"), path.read_text(encoding="utf-8"))


def check_same(staged: Path, folder: Path, repo: Repo, move_ref: bool) -> None:
    """Raise UserError where publishing would put other content in the place of what is there."""
    for snapshot in (staged / "snapshots").glob("*"):
        there = snapshot_files(folder / "snapshots" / snapshot.name)
        for name, path in snapshot_files(snapshot).items():
            if name in there and there[name].resolve().name != path.resolve().name and not equal(there[name], path):
                raise UserError(
                    f"{repo}: the cache has another {name} for commit {snapshot.name[:12]}; nothing was changed. "
                    f"See `hub.py verify {repo}`, or remove it first: hf cache rm {snapshot.name}"
                )
    for path in (path for path in (staged / "refs").rglob("*") if path.is_file()):
        name, now = path.relative_to(staged / "refs").as_posix(), path.read_text(encoding="utf-8")
        before = read_ref(folder, name) if (folder / "refs" / name).is_file() else now
        if before != now and not move_ref:
            raise UserError(
                f"{repo}: {name} is commit {before[:12] if before else ''} in the cache, and {now[:12]} here; nothing was "
                f"changed. Keep both with --revision OTHER_NAME, or let {name} name this one with --move_ref"
            )


def equal(first: Path, second: Path) -> bool:
    return first.stat().st_size == second.stat().st_size and has_name(first, second.resolve().name) is True


def merge_folder(source: Path, target: Path) -> None:
    """Rename a folder into place; where there is one already, add the files that it lacks."""
    try:
        os.rename(source, target)
        return
    except OSError:
        if not target.is_dir():
            raise
    for path in sorted(path for path in source.rglob("*") if path.is_symlink() or path.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_file():
            os.replace(path, place)
    shutil.rmtree(source)
