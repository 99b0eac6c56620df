"""Writing to the cache: one writer at a time, drafts that no reader sees, and whole entries moved into place."""

import contextlib
import filecmp
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from lib.errors import UserError
from lib.hub.cache.layout import Repo, cache_root, linked_blob, read_ref, snapshot_files
from lib.runtime.atomic import write_atomically


class CacheError(UserError):
    """The cache cannot be written: no permission, or no space."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Raise CacheError in the place of any OSError."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"the cache {cache_root()} cannot be written: {error}; set HF_HUB_CACHE to another") from error


def locks_folder(repo: Repo) -> Path:
    """Where the locks and drafts of a repository are; no reader looks there."""
    return cache_root() / ".locks" / repo.folder_name


@contextlib.contextmanager
def lock_repo(repo: Repo, name: str = "entry", when_taken: str = "") -> Iterator[None]:
    """Hold a lock of a repository; `when_taken` is printed when another process holds it, and then it is waited for.

    Raises CacheError when the cache cannot be written.
    """
    path = locks_folder(repo) / f"{name}.lock"
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(file_lock(path, 0.05)):
            if when_taken:
                print(when_taken, file=sys.stderr, flush=True)
            stack.enter_context(file_lock(path))
        yield


@contextlib.contextmanager
def file_lock(path: Path, timeout: float | None = None) -> Iterator[bool]:
    """Hold a file lock; False when it could not be had within `timeout` seconds (None: wait). Raises CacheError."""
    from huggingface_hub.utils import WeakFileLock  # reads the environment on import: only after configure_endpoint

    with contextlib.ExitStack() as stack:
        held = True
        with writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(WeakFileLock(path, timeout=timeout))
            except Timeout:
                held = False
        yield held


@contextlib.contextmanager
def staging_folder(repo: Repo) -> Iterator[Path]:
    """A folder for a draft, on the file system of the cache; removed afterwards.

    Those of killed processes are removed as well: nobody holds the locks beside them.
    """
    parent = locks_folder(repo)
    for lock in parent.glob("staging-*.lock"):
        with file_lock(lock, 0.05) as abandoned:
            if abandoned:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
    folder = parent / f"staging-{uuid.uuid4().hex[:12]}"
    with file_lock(folder.with_suffix(".lock")):
        try:
            with writing():
                folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def publish_entry(staged: Path, repo: Repo, move_ref: bool = False) -> None:
    """Move an entry, built in `staged` on the same file system, into the cache: blobs, then snapshots, refs last.

    Call under `lock_repo`. Raises UserError, before anything is moved, when the cache has other content for the same
    commit, or, without `move_ref`, another commit for the same ref.
    """
    folder = repo.folder
    check_conflicts(staged, folder, repo, move_ref)
    for kind in ("blobs", "snapshots", "trees", ".no_exist"):
        if (staged / kind).exists():
            (folder / kind).mkdir(parents=True, exist_ok=True)
    for blob in sorted((staged / "blobs").glob("*")):
        # The same name is the same content, unless the one in the cache is damaged: then this one, checked, repairs it.
        os.replace(blob, folder / "blobs" / blob.name)
    for kind in ("snapshots", ".no_exist"):
        for path in sorted((staged / kind).glob("*")):
            merge_folder(path, folder / kind / path.name)
    for path in sorted((staged / "trees").glob("*.json")):
        os.replace(path, folder / "trees" / path.name)
    for path in sorted(path for path in (staged / "refs").rglob("*") if path.is_file()):
        write_atomically(folder / "refs" / path.relative_to(staged / "refs"), path.read_text(encoding="utf-8"))


def check_conflicts(staged: Path, folder: Path, repo: Repo, move_ref: bool) -> None:
    """Raise UserError where publishing would replace a file of a commit, or move a ref, in the cache."""
    for snapshot in (staged / "snapshots").glob("*"):
        there = snapshot_files(folder / "snapshots" / snapshot.name)
        for name, path in snapshot_files(snapshot).items():
            if name in there and not same_content(there[name], path):
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


def same_content(there: Path, staged: Path) -> bool:
    """Whether two files of snapshots are the same, by the blobs they link to, damaged or not; else byte by byte."""
    if there.is_symlink() and staged.is_symlink() and linked_blob(there) == linked_blob(staged):
        return True
    return filecmp.cmp(there, staged, shallow=False)


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
