"""What a downloaded folder records about its origin: the commit, the hash of each file, the list of all files.

Known layouts: loose files (browser, network disk, ModelScope), `hf download --local-dir`, a git clone, and a repository
in another machine's Hugging Face cache.
"""

import collections
import dataclasses
import os
import re
from pathlib import Path, PurePosixPath

from lib.errors import UserError
from lib.hub.cache.contents import HASH, POINTER
from lib.hub.cache.layout import COMMIT, Repo, blob_name, linked_blob, read_ref, read_tree
from lib.runtime.git import git

IGNORED_FOLDERS = {".git", ".cache", "._____temp", "__MACOSX", ".ipynb_checkpoints", ".locks", "@eaDir"}
IGNORED_FILES = {".msc", ".mdl", ".mv", ".DS_Store", "Thumbs.db", "desktop.ini", "CACHEDIR.TAG"}
UNFINISHED = (".aria2", ".crdownload", ".part", ".incomplete", ".download", ".downloading", ".xltd", ".td")
"""Suffixes that browsers, download managers and network disks give to unfinished downloads."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Files by their names in the repository; `names` are the hashes of their blobs on the Hub, `tree` its full list.

    `hashes` are sha256 from elsewhere: they prove a file, and do not name its blob.
    """

    layout: str
    files: dict[str, Path]
    commit: str | None = None
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    tree: dict[str, dict] | None = None
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def unproven(self) -> tuple[str, ...]:
        """The files without a hash to compare them with."""
        return tuple(sorted(set(self.files) - set(self.names) - set(self.hashes)))


def read_provenance(folder: Path, repo: Repo, revision: str) -> Provenance:
    """Recognize the layout of `folder` and read what it records.

    Raises UserError for links and names that leave the folder, and for unfinished downloads.
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
    """The only folder inside one that holds nothing else, as in most archives; else the folder itself.

    A data set may consist of a folder data/, which is part of the names of its files.
    """
    while True:
        items = [item for item in folder.iterdir() if not is_debris(item.name) and item.name not in IGNORED_FOLDERS]
        lone = len(items) == 1 and items[0].is_dir() and not items[0].is_symlink()
        noted = (folder / ".git").exists() or (folder / ".cache" / "huggingface").is_dir()
        if not lone or noted or (repo.repo_type == "dataset" and items[0].name == "data"):
            return folder
        folder = items[0]


def is_debris(name: str) -> bool:
    """Whether a file belongs to the operating system or a downloader, such as the ._config.json of macOS."""
    return name in IGNORED_FILES or name.startswith("._")


def list_files(folder: Path, *roots: Path) -> dict[str, Path]:
    """All files below `folder` by their relative names. Raises UserError for a link that leaves the `roots`."""
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


def read_local_dir(folder: Path, files: dict[str, Path]) -> Provenance:
    """A folder of `hf download --local-dir`: .cache/huggingface has commit and hash of each file, and the list of all.

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
    names = {name: etag for name, (of, etag) in records.items() if of == commit}
    tree = read_tree(notes, commit) if commit else None
    names |= {name: blob_name(entry) for name, entry in (tree or {}).items()}
    if tree:
        files = {name: path for name, path in files.items() if name in tree}
    return Provenance("folder of `hf download`", files, commit, names, tree)


def read_git(folder: Path, files: dict[str, Path]) -> Provenance | None:
    """Commit and list of a git clone, with the LFS hashes from the pointers that git keeps; None where git fails.

    Files that are not part of the commit are left out. Where the folder has only the pointer of a file, its content may be
    among the objects of `git lfs fetch`.
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
        if int(size) < 200 and (pointer := git(folder, "cat-file", "blob", oid)) and pointer.startswith(POINTER):
            digest = re.search(r"oid sha256:([0-9a-f]{64})", pointer)
            length = re.search(r"size (\d+)", pointer)
            if digest and length:
                lfs = {"lfs_sha256": digest[1], "lfs_size": int(length[1])}
                tree[name] |= {"size": int(length[1])} | lfs
    tracked = {}
    for name in set(files) & set(tree):
        path, digest = files[name], tree[name].get("lfs_sha256", "")
        fetched = folder / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
        is_pointer = digest and path.stat().st_size < 200 and path.read_bytes().startswith(POINTER.encode())
        tracked[name] = fetched if is_pointer and fetched.is_file() else path
    names = {name: blob_name(entry) for name, entry in tree.items()}
    return Provenance("git clone", dict(sorted(tracked.items())), commit, names, tree)


def cache_entry(folder: Path, repo: Repo) -> tuple[Path, str | None] | None:
    """(the repository's folder, the commit) where `folder` is a cache, a repository in one, or a snapshot of it.

    The commit is None unless `folder` is a snapshot. Raises UserError for a cache with other repositories only.
    """
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
    """A snapshot of a cache: `commit`, else that of the ref, else the only one. Raises UserError when there is none.

    The hash of a file is the name of its blob, to which it is a symlink, or a hard link as `tar --dereference` makes it.
    """
    snapshots = sorted(path.name for path in (entry / "snapshots").iterdir() if path.is_dir())
    commit = commit or read_ref(entry, revision)
    if commit is None and len(snapshots) == 1:
        commit = snapshots[0]
    if commit is None or commit not in snapshots:
        raise UserError(
            f"{entry} has the snapshots {', '.join(snapshots) or '(none)'} and none named {revision}; "
            "give the folder snapshots/COMMIT of the one you mean"
        )
    # The blobs may lie in the folder that all repositories of a cache share.
    files = list_files(entry / "snapshots" / commit, entry.resolve(), entry.resolve().parent / "blobs")
    tree = read_tree(entry, commit)
    blobs = {path.stat().st_ino: path.name for path in (entry / "blobs").glob("*") if path.is_file()}
    names = {}
    for name, path in files.items():
        names[name] = linked_blob(path) if path.is_symlink() else blobs.get(path.stat().st_ino, "")
    names |= {name: blob_name(item) for name, item in (tree or {}).items()}
    names = {name: text for name, text in names.items() if HASH.fullmatch(text)}
    real = commit if COMMIT.fullmatch(commit) else None
    return Provenance("Hugging Face cache", files, real, names, tree)


def read_sha256_list(path: Path) -> dict[str, str]:
    """Names and hashes of a list as `sha256sum` prints it. Raises UserError with the first line that is not one."""
    if not path.is_file():
        raise UserError(f"--sha256 {path}: no such file")
    names, data = {}, path.read_bytes()
    # PowerShell writes redirected output in UTF-16.
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
