"""The Hugging Face cache as it lies on disk: where a repository is, what is in it, whether it is sound. No network.

models--user--name/refs/main               the commit, 40 hex digits and no newline
models--user--name/blobs/HASH              contents under their names: git hash, or sha256 for LFS files
models--user--name/snapshots/COMMIT/FILE   relative links to the blobs
models--user--name/trees/COMMIT.json       the repository's full list of files, where it is known
models--user--name/.no_exist/COMMIT/FILE   files known not to exist
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from lib.config import UserError
from lib.hub_files import damage, has_name, missing_shards

COMMIT = re.compile(r"[0-9a-f]{40}")
REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Repo:
    """A repository by name; `repo_type` is model or dataset."""

    repo_id: str
    repo_type: str = "model"

    def __str__(self) -> str:
        return self.repo_id if self.repo_type == "model" else f"{self.repo_type}s/{self.repo_id}"

    @property
    def folder_name(self) -> str:
        return f"{self.repo_type}s--{self.repo_id.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        return cache_root() / self.folder_name


def parse_repo(text: str, repo_type: str = "model") -> Repo:
    """`user/name` or `datasets/user/name`. Raises UserError for what is no repository name, such as a path that escapes."""
    for prefix in ("model", "dataset"):
        if text.startswith((f"{prefix}s/", f"{prefix}/")):
            repo_type, text = prefix, text.partition("/")[2]
    if not REPO_ID.fullmatch(text) or ".." in text or "--" in text:
        raise UserError(f"{text!r} is not a repository; expected user/name, or datasets/user/name")
    return Repo(text, repo_type)


def cache_root() -> Path:
    from huggingface_hub import constants  # reads the environment when it is imported, so not before it is settled

    return Path(constants.HF_HUB_CACHE)


def cached_repos() -> list[Repo]:
    """All repositories in the cache, models before data sets."""
    found = []
    for path in sorted(cache_root().glob("*s--*")):
        kind, _, name = path.name.partition("--")
        if kind in ("models", "datasets") and path.is_dir():
            found.append(Repo(name.replace("--", "/", 1), kind.removesuffix("s")))
    return sorted(found, key=lambda repo: (repo.repo_type != "model", repo.repo_id))


def read_ref(folder: Path, revision: str) -> str | None:
    """The commit of a branch or tag, as the entry in `folder` knows it; a commit is its own."""
    path = folder / "refs" / revision
    if path.is_file() and ".." not in Path(revision).parts:
        return path.read_text(encoding="utf-8").strip()
    return revision if COMMIT.fullmatch(revision) else None


def find_snapshot(repo: Repo, revision: str | None = None) -> Path | None:
    """The folder with the files of a revision, whole or not; None when the cache has none."""
    commit = read_ref(repo.folder, revision or "main")
    folder = repo.folder / "snapshots" / (commit or "-")
    return folder if folder.is_dir() else None


def snapshot_files(snapshot: Path) -> dict[str, Path]:
    """The files of a snapshot that can be opened, by their names in the repository."""
    found = {}
    for parent, folders, names in os.walk(snapshot):
        folders.sort()
        for name in sorted(names):
            path = Path(parent) / name
            if path.is_file():
                found[path.relative_to(snapshot).as_posix()] = path
    return found


def read_tree(folder: Path, commit: str) -> dict[str, dict] | None:
    """The full list of a repository's files, {name: {size, blob_id, lfs_sha256?}}, where the entry in `folder` has it."""
    path = folder / "trees" / f"{commit}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def blob_name(entry: dict) -> str:
    return entry.get("lfs_sha256") or entry["blob_id"]


def write_whole(path: Path, text: str) -> None:
    """Write a small file in one piece, with the permissions the umask gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(name, 0o666 & ~umask())
    os.replace(name, path)


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


# ---------------------------------------------------------------------------------------------------- verify


def verify_repo(repo: Repo) -> Iterator[str]:
    """Every fault of a repository's entry, one sentence each: links, refs, contents against names, shards.

    Reads all contents once; asks no network.
    """
    folder = repo.folder
    snapshots = sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    if not snapshots:
        yield f"{repo}: no snapshot in {folder}"
    yield from ref_faults(repo)
    for blob in sorted((folder / "blobs").glob("*")):
        if blob.suffix != ".incomplete" and has_name(blob, blob.name) is False:
            users = [
                name for snapshot in snapshots for name, path in snapshot_files(snapshot).items() if same(path, blob)
            ]
            told = f"{', '.join(sorted(set(users))) or 'a file'} is damaged: its content is not that of its name"
            yield f"{repo}: {told} blobs/{blob.name[:12]}"
    for snapshot in snapshots:
        yield from snapshot_faults(repo, snapshot)


def ref_faults(repo: Repo) -> Iterator[str]:
    refs = [path for path in sorted((repo.folder / "refs").rglob("*")) if path.is_file()]
    if not refs:
        yield f"{repo}: no refs/main, so that `hf cache prune` would delete it; import the folder again"
    for path in refs:
        name, text = path.relative_to(repo.folder).as_posix(), path.read_text(encoding="utf-8", errors="replace")
        if text != text.strip():
            yield f"{repo}: {name} ends with a newline, which hides the entry; run: printf %s {text.strip()} > {path}"
        elif not (repo.folder / "snapshots" / text).is_dir():
            yield f"{repo}: {name} names the commit {text[:12]}, of which there is no snapshot"


def snapshot_faults(repo: Repo, snapshot: Path) -> Iterator[str]:
    """Links without a file, files damaged by their looks or against the repository's list, and shards that are missing."""
    files, tree = snapshot_files(snapshot), read_tree(repo.folder, snapshot.name) or {}
    where = f"{repo}@{snapshot.name[:12]}"
    for path in sorted(snapshot.rglob("*")):
        if path.is_symlink() and not path.exists():
            yield f"{where}: {path.relative_to(snapshot)} is a link without a file: {os.readlink(path)}"
    for name, path in files.items():
        if fault := damage(path, name):
            yield f"{where}: {name} {fault}"
        elif not path.is_symlink() and name in tree and has_name(path, blob_name(tree[name])) is False:
            yield f"{where}: {name} is damaged: its content is not that of the repository's list"
    for name in missing_shards(files):
        yield f"{where}: {name} is missing"


def same(path: Path, blob: Path) -> bool:
    return path.resolve() == blob.resolve()


# ---------------------------------------------------------------------------------------------------- publish


def lock_repo(repo: Repo, name: str = "entry") -> FileLock:
    """One writer at a time per repository; the folder of the lock also holds what is not yet whole.

    Raises UserError when the cache cannot be written.
    """
    folder = locks_folder(repo)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock", mode=0o666 & ~umask())
    except OSError as error:
        raise UserError(f"the cache {cache_root()} cannot be written: {error}; set HF_HUB_CACHE to another") from error


def locks_folder(repo: Repo) -> Path:
    return cache_root() / ".locks" / repo.folder_name


def work_folder() -> Path:
    """A folder on the file system of the cache for what is on its way into it. Raises UserError as above."""
    lock_repo(Repo("incoming"))
    return locks_folder(Repo("incoming"))


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
        write_whole(folder / "refs" / path.relative_to(staged / "refs"), path.read_text(encoding="utf-8"))


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
