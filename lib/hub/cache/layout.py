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
from collections.abc import Iterator
from pathlib import Path

from lib.errors import UserError
from lib.hub.cache.files import HASH, damage, has_name, missing_shards

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
    """`user/name`, `datasets/user/name`, or the address of either.

    Raises UserError for what is no repository name, such as a path that escapes.
    """
    text = re.sub(r"^https?://[^/]+/", "", text).removesuffix("/")
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
    if ".." not in Path(revision).parts and not Path(revision).is_absolute() and path.is_file():
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
        tree = json.loads(path.read_text(encoding="utf-8"))["files"]
        check_tree(tree)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return tree


def check_tree(tree: dict[str, dict]) -> None:
    """Raise ValueError, or what comes of reading it, for a list of files that is none: sizes, hashes, names that stay inside."""
    for name, entry in tree.items():
        inside = name and not name.startswith("/") and ".." not in name.split("/")
        if not (inside and isinstance(entry["size"], int) and HASH.fullmatch(blob_name(entry))):
            raise ValueError(f"{name!r} is no entry of a list of files")


def blob_name(entry: dict) -> str:
    return entry.get("lfs_sha256") or entry["blob_id"]


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


def is_nameless(repo: Repo) -> bool:
    """Whether no branch or tag names what is there of a repository, as after the download of a pinned commit."""
    return not any(path.is_file() for path in (repo.folder / "refs").rglob("*"))


def ref_faults(repo: Repo) -> Iterator[str]:
    for path in (path for path in sorted((repo.folder / "refs").rglob("*")) if path.is_file()):
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
