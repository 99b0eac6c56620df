"""The Hugging Face cache on disk: where a repository is, and what is in it. No network.

models--user--name/refs/main               the commit, 40 hex digits and no newline
models--user--name/blobs/HASH              contents named by their hash: git's, or sha256 for files in LFS
models--user--name/snapshots/COMMIT/FILE   relative symlinks to the blobs
models--user--name/trees/COMMIT.json       the list of all files of the repository, where it is known
models--user--name/.no_exist/COMMIT/FILE   files known not to exist
"""

import dataclasses
import json
import os
import re
from pathlib import Path

from lib.errors import UserError
from lib.hub.cache.contents import HASH

COMMIT = re.compile(r"[0-9a-f]{40}")
LIKE_COMMIT = re.compile(r"(?!\d{1,8}$)[0-9a-fA-F]{7,40}")
"""What reads as a commit, whole or abbreviated; a short number, as a date, is a tag."""


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


def is_repo_id(name: str) -> bool:
    """Whether the Hub allows a repository of this name, such as user/name."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def parse_repo(text: str, repo_type: str = "model") -> Repo:
    """`user/name`, `datasets/user/name`, or the URL of either.

    Raises UserError for anything else, such as a path that leaves the cache.
    """
    name = re.sub(r"^https?://[^/]+/", "", text).removesuffix("/")
    for prefix in ("model", "dataset"):
        if name.startswith((f"{prefix}s/", f"{prefix}/")):
            repo_type, name = prefix, name.partition("/")[2]
    if not is_repo_id(name):
        raise UserError(f"{text!r} is not a repository; expected user/name, or datasets/user/name")
    return Repo(name, repo_type)


def cache_root() -> Path:
    from huggingface_hub import constants  # reads the environment on import: only after configure_endpoint

    return Path(constants.HF_HUB_CACHE)


def cached_repos() -> list[Repo]:
    """All repositories in the cache, models before data sets, damaged ones included."""
    found = []
    for path in cache_root().glob("*s--*"):
        kind, _, name = path.name.partition("--")
        if kind in ("models", "datasets") and path.is_dir():
            found.append(Repo(name.replace("--", "/", 1), kind.removesuffix("s")))
    return sorted(found, key=lambda repo: (repo.repo_type != "model", repo.repo_id))


def read_ref(folder: Path, revision: str) -> str | None:
    """The commit of a branch or tag, by the refs of a repository's `folder`; None when they have none.

    A commit is itself: no ref can give its name to another one.
    """
    path = folder / "refs" / revision
    if COMMIT.fullmatch(revision):
        return revision
    if ".." in Path(revision).parts or Path(revision).is_absolute() or not path.is_file():
        return None
    commit = path.read_text(encoding="utf-8", errors="replace").strip()
    return None if is_false_name(revision, commit) else commit


def is_false_name(revision: str, commit: str) -> bool:
    """Whether a revision reads as a commit, whole or abbreviated, and `commit` is another one."""
    return bool(LIKE_COMMIT.fullmatch(revision)) and not commit.startswith(revision)


def false_refs(folder: Path) -> list[str]:
    """The refs of a repository's `folder` that give the name of a commit to another one; `read_ref` ignores them."""
    refs = [path for path in sorted((folder / "refs").rglob("*")) if path.is_file()]
    names = {path.relative_to(folder / "refs").as_posix(): path for path in refs}
    return [
        name
        for name, path in names.items()
        if is_false_name(name, path.read_text(encoding="utf-8", errors="replace").strip())
    ]


def find_snapshot(repo: Repo, revision: str | None = None) -> Path | None:
    """The folder with the files of a revision, complete or not; None when the cache has none."""
    commit = read_ref(repo.folder, revision or "main")
    folder = repo.folder / "snapshots" / (commit or "-")
    return folder if folder.is_dir() else None


def snapshot_files(snapshot: Path) -> dict[str, Path]:
    """The files of a snapshot that can be opened, by their names in the repository."""
    return {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*")) if path.is_file()}


def linked_blob(path: Path) -> str:
    """The name of the blob that a file of a snapshot links to: its hash; of a plain file, its own name.

    Follows one link only: huggingface_hub may store a blob as a link into a folder that all repositories share, where it
    has another name.
    """
    return Path(os.readlink(path)).name if path.is_symlink() else path.name


def read_tree(folder: Path, commit: str) -> dict[str, dict] | None:
    """All files of a repository, {name: {size, blob_id, lfs_sha256?}}; None where `folder` has no valid list of them."""
    path = folder / "trees" / f"{commit}.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))["files"]
        check_tree(tree)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return tree


def check_tree(tree: dict[str, dict]) -> None:
    """Check sizes, hashes, and that no name leaves the folder.

    Raises ValueError, or what reading a tree of another form raises.
    """
    for name, entry in tree.items():
        inside = name and not name.startswith("/") and ".." not in name.split("/")
        if not (inside and isinstance(entry["size"], int) and HASH.fullmatch(blob_name(entry))):
            raise ValueError(f"{name!r} is not an entry of a list of files")


def blob_name(entry: dict) -> str:
    """The name of the blob of a tree's entry: sha256 for a file in LFS, else git's hash."""
    return entry.get("lfs_sha256") or entry["blob_id"]
