"""What a folder carried by hand still knows about where it is from: commit, names of contents, full list of files.

Known layouts: a folder of loose files (browser, net disk, ModelScope), `hf download --local-dir`, a git clone, and an
entry of another machine's Hugging Face cache.
"""

import collections
import dataclasses
import os
import re
from pathlib import Path, PurePosixPath

from lib.errors import UserError
from lib.hub.cache.files import HASH, POINTER
from lib.hub.cache.layout import COMMIT, Repo, blob_name, read_ref, read_tree
from lib.runtime.git import git

IGNORED_FOLDERS = {".git", ".cache", "._____temp", "__MACOSX", ".ipynb_checkpoints", ".locks", "@eaDir"}
IGNORED_FILES = {".msc", ".mdl", ".mv", ".DS_Store", "Thumbs.db", "desktop.ini", "CACHEDIR.TAG"}
UNFINISHED = (".aria2", ".crdownload", ".part", ".incomplete", ".download", ".downloading", ".xltd", ".td")
"""Endings that browsers, download managers and net disks give to files that are not whole yet."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Files by name in the repository; `names` are the hashes the Hub keeps them under, `tree` its full list.

    `hashes` are sha256 from elsewhere: they prove a file, but do not name it.
    """

    layout: str
    files: dict[str, Path]
    commit: str | None = None
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    tree: dict[str, dict] | None = None
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def unproven(self) -> tuple[str, ...]:
        """The files for which the source has no hash."""
        return tuple(sorted(set(self.files) - set(self.names) - set(self.hashes)))


def read_provenance(folder: Path, repo: Repo, revision: str) -> Provenance:
    """Recognise the layout of `folder` and read what it knows.

    Raises UserError for links and names that leave the folder, and for downloads that are not finished.
    """
    inner = inner_folder(folder, repo)
    if entry := cache_entry(folder, repo) or cache_entry(inner, repo):
        return read_cache_entry(*entry, revision)
    folder = inner
    files = list_files(folder, folder.resolve())
    if (folder / ".git").exists() and (known := read_git(folder, files)):
        return known
    if (folder / ".cache" / "huggingface").is_dir():
        return read_local_dir(folder, files)
    modelscope = any((folder / name).exists() for name in (".msc", ".mdl", ".mv"))
    return Provenance("ModelScope folder" if modelscope else "folder of files", files)


def inner_folder(folder: Path, repo: Repo) -> Path:
    """The only folder inside one that holds nothing else, as archives have it; else the folder itself.

    A data set may be no more than its folder data/, which is part of the names of its files.
    """
    while True:
        items = [item for item in folder.iterdir() if not is_debris(item.name) and item.name not in IGNORED_FOLDERS]
        lone = len(items) == 1 and items[0].is_dir() and not items[0].is_symlink()
        noted = (folder / ".git").exists() or (folder / ".cache" / "huggingface").is_dir()
        if not lone or noted or (repo.repo_type == "dataset" and items[0].name == "data"):
            return folder
        folder = items[0]


def is_debris(name: str) -> bool:
    """Whether a file is of the operating system or a downloader, such as the ._config.json of macOS."""
    return name in IGNORED_FILES or name.startswith("._")


def list_files(folder: Path, *roots: Path) -> dict[str, Path]:
    """All files below `folder` by their relative names; nothing may lie outside of the `roots`, whatever links say."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - IGNORED_FOLDERS)
        for name in [*folders, *sorted(name for name in names if not is_debris(name))]:
            path = Path(parent) / name
            shown = path.relative_to(folder).as_posix()
            if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
                raise UserError(f"{shown} is a link that leaves the folder: {os.readlink(path)}")
            if not name.isprintable():
                raise UserError(f"{shown!r}: no file of the Hub has such a name; rename or remove it")
            if name.endswith(UNFINISHED):
                raise UserError(f"{shown}: a download is not finished; finish it, or remove this file")
            if not path.is_file() and not path.is_dir():
                raise UserError(f"{shown} is no ordinary file; remove it from the folder")
            if path.is_file():
                found[shown] = path
    return found


# ---------------------------------------------------------------------------------------------------- hf download


def read_local_dir(folder: Path, files: dict[str, Path]) -> Provenance:
    """What `hf download --local-dir` leaves in .cache/huggingface: commit and name of each file, list of the repository.

    Files that are not on that list are left out.
    """
    notes = folder / ".cache" / "huggingface"
    records = {}
    for path in (notes / "download").rglob("*.metadata"):
        lines = path.read_text(encoding="utf-8", errors="replace").split()
        if len(lines) >= 2 and COMMIT.fullmatch(lines[0]) and HASH.fullmatch(lines[1]):
            records[path.relative_to(notes / "download").as_posix().removesuffix(".metadata")] = (lines[0], lines[1])
    commits = collections.Counter(commit for commit, _ in records.values())
    commit = commits.most_common(1)[0][0] if commits else None
    names = {name: tag for name, (of, tag) in records.items() if of == commit}
    tree = read_tree(notes, commit) if commit else None
    names |= {name: blob_name(entry) for name, entry in (tree or {}).items()}
    if tree:
        files = {name: path for name, path in files.items() if name in tree}
    return Provenance("folder of `hf download`", files, commit, names, tree)


# ---------------------------------------------------------------------------------------------------- git


def read_git(folder: Path, files: dict[str, Path]) -> Provenance | None:
    """Commit and list of a git clone, the LFS names read from the pointers it keeps; None where git cannot tell.

    Files that are not part of the commit are left out; where the folder has only the pointer of an LFS file, its content
    may be among the objects that `git lfs fetch` has brought.
    """
    commit = git(folder, "rev-parse", "HEAD")
    listing = git(folder, "ls-tree", "-r", "-l", "-z", "--full-tree", "HEAD")
    if commit is None or listing is None:
        return None
    tree: dict[str, dict] = {}
    for line in listing.split("\0")[:-1]:
        head, _, name = line.partition("\t")
        mode, kind, oid, size = head.split()
        if kind != "blob" or mode == "120000":
            continue
        tree[name] = {"size": int(size), "blob_id": oid}
        if (
            int(size) < 200
            and (pointer := git(folder, "cat-file", "blob", oid))
            and pointer.startswith(POINTER.decode())
        ):
            digest = re.search(r"oid sha256:([0-9a-f]{64})", pointer)
            length = re.search(r"size (\d+)", pointer)
            if digest and length:
                lfs = {"lfs_sha256": digest[1], "lfs_size": int(length[1])}
                tree[name] |= {"size": int(length[1])} | lfs
    tracked = {name: lfs_object(folder, path, tree[name]) for name, path in files.items() if name in tree}
    names = {name: blob_name(entry) for name, entry in tree.items()}
    return Provenance("git clone", tracked, commit, names, tree)


def lfs_object(folder: Path, path: Path, entry: dict) -> Path:
    """`path`, or where it is but a pointer the object behind it, if that was fetched."""
    digest = entry.get("lfs_sha256", "")
    fetched = folder / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
    is_pointer = bool(digest) and path.stat().st_size < 200 and path.read_bytes().startswith(POINTER)
    return fetched if is_pointer and fetched.is_file() else path


# ---------------------------------------------------------------------------------------------------- cache


def cache_entry(folder: Path, repo: Repo) -> tuple[Path, str | None] | None:
    """(entry, commit where the folder names one) if `folder` is a cache, an entry of one, or a snapshot of an entry."""
    if folder.parent.name == "snapshots" and (folder.parent.parent / "refs").is_dir():
        return folder.parent.parent, folder.name
    for entry in (folder, folder / repo.folder_name, folder / "hub" / repo.folder_name):
        if (entry / "snapshots").is_dir():
            return entry, None
    found = [path.parent.name for path in (*folder.glob("*--*/snapshots"), *folder.glob("hub/*--*/snapshots"))]
    if entries := sorted(name for name in found if name.startswith(("models--", "datasets--"))):
        raise UserError(
            f"{folder} is a cache that holds {', '.join(entries)}, but not {repo.folder_name}; "
            "give the folder of one of them, or another --repo_id"
        )
    return None


def read_cache_entry(entry: Path, commit: str | None, revision: str) -> Provenance:
    """A snapshot of another machine's cache: by the folder, by its ref, or the only one."""
    snapshots = sorted(path.name for path in (entry / "snapshots").iterdir() if path.is_dir())
    commit = commit or read_ref(entry, revision)
    if commit is None and len(snapshots) == 1:
        commit = snapshots[0]
    if commit is None or commit not in snapshots:
        raise UserError(
            f"{entry} has the snapshots {', '.join(snapshots) or '(none)'} and none named {revision}; "
            "give the folder snapshots/COMMIT of the one you mean"
        )
    # The blobs may lie in the store that all entries of a cache share.
    files = list_files(entry / "snapshots" / commit, entry.resolve(), entry.resolve().parent / "blobs")
    tree = read_tree(entry, commit)
    names = {name: os.readlink(path).rpartition("/")[2] for name, path in files.items() if path.is_symlink()}
    names |= {name: blob_name(item) for name, item in (tree or {}).items()}
    names = {name: text for name, text in names.items() if HASH.fullmatch(text)}
    real = commit if COMMIT.fullmatch(commit) else None
    return Provenance("Hugging Face cache", files, real, names, tree)


def read_sha256_list(path: Path) -> dict[str, str]:
    """Names and hashes of a list as `sha256sum` prints it. Raises UserError with the line that is none."""
    if not path.is_file():
        raise UserError(f"--sha256 {path}: no such file")
    names, data = {}, path.read_bytes()
    # PowerShell writes what it redirects in UTF-16.
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        digest, _, name = line.strip().partition(" ")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest) or not name:
            raise UserError(
                f"--sha256 {path}, line {number}: expected a sha256 and a file name, as sha256sum prints them"
            )
        name = name.strip().removeprefix("*").replace("\\", "/")
        names[PurePosixPath(name).as_posix()] = digest.lower()
    return names
