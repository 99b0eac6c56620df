"""Archives of repositories: opened without trusting them, and written for another machine with a manifest."""

import contextlib
import dataclasses
import io
import json
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lib.errors import UserError
from lib.hub.cache.files import has_name
from lib.hub.cache.layout import (
    COMMIT,
    Repo,
    check_tree,
    find_snapshot,
    parse_repo,
    read_tree,
    snapshot_files,
    verify_repo,
)
from lib.hub.cache.publish import lock_repo, publish_entry, staging_folder, writing
from lib.hub.importing.folder import finish_entry
from lib.hub.importing.provenance import Provenance
from lib.runtime.atomic import MANIFEST, sha256

MAX_FILES = 100_000
MAX_RATIO = 200
"""What unpacks to more than so many times the size of the archive is a bomb; weights hardly shrink at all."""
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, OSError)
"""What the libraries raise for archives that are cut, altered, or packed by a method they do not know."""


# ---------------------------------------------------------------------------------------------------- open


@contextlib.contextmanager
def opened(source: Path) -> Iterator[Path]:
    """`source` itself if it is a folder; an archive unpacked to a folder beside the cache that is gone afterwards.

    Raises UserError for an archive that is broken or holds links, or names that leave it.
    """
    if source.is_dir():
        yield source
        return
    if not source.is_file():
        raise UserError(f"{source}: no such folder or archive")
    with staging_folder(Repo("incoming")) as target:
        try:
            if zipfile.is_zipfile(source):
                unzip(source, target)
            elif tarfile.is_tarfile(source):
                untar(source, target)
            else:
                raise UserError(
                    f"{source} is neither a folder nor a .zip or .tar archive; a cut download looks like this too. "
                    "Unpack other archives, and give the folder; the folder also of single files."
                )
        except BROKEN as error:
            raise UserError(f"{source} cannot be unpacked: {error}") from error
        yield target


def check_member(source: Path, name: str, ordinary: bool) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in (parts.parts or ("",))[0]:
        raise UserError(f"{source}: {name!r} would leave the folder; this archive is not to be trusted")
    if not ordinary:
        raise UserError(f"{source}: {name!r} is a link or device; pack ordinary files, or use `hub.py pack`")


def check_size(source: Path, size: int, target: Path) -> None:
    """Raise UserError for contents of so many bytes if that is a bomb, or more than the disk has room for."""
    if size > max(MAX_RATIO * source.stat().st_size, 2**20):
        raise UserError(f"{source} grows more than {MAX_RATIO}-fold when unpacked; this archive is not to be trusted")
    if size > (free := shutil.disk_usage(target).free):
        raise UserError(
            f"{source} unpacks to {size / 1e9:.1f} GB and more, {free / 1e9:.1f} GB are free beside the cache; "
            "set HF_HUB_CACHE to a larger disk"
        )


def unzip(source: Path, target: Path) -> None:
    """Unpack a .zip of ordinary files."""
    with zipfile.ZipFile(source) as archive:
        members = archive.infolist()
        if len(members) > MAX_FILES:
            raise UserError(f"{source} holds {len(members):,} files; this is no model or data set")
        for member in members:
            mode = member.external_attr >> 16
            check_member(source, member.filename, member.is_dir() or stat.S_IFMT(mode) in (0, stat.S_IFREG))
            if member.flag_bits & 1:
                raise UserError(f"{source} needs a password; unpack it with that, and give the folder")
            member.filename = member.filename.replace("\\", "/")  # as some programs of Windows write them
        check_size(source, sum(member.file_size for member in members), target)
        archive.extractall(target, members)


def untar(source: Path, target: Path) -> None:
    """Unpack a .tar, compressed or not, of ordinary files, and of links that stay inside it.

    Links come last, so that no file can be written through one.
    """
    size, links = 0, []
    with tarfile.open(source) as archive:
        for number, member in enumerate(archive):
            if number > MAX_FILES:
                raise UserError(f"{source} holds more than {MAX_FILES:,} files; this is no model or data set")
            check_member(source, member.name, member.isfile() or member.isdir() or member.issym() or member.islnk())
            if member.issym() or member.islnk():
                links.append(member)
                continue
            size += member.size
            check_size(source, size, target)
            archive.extract(member, target, filter="data")
        if archive.fileobj:
            archive.fileobj.read(2**20)  # on to the checksum of a .gz, which lies behind the last member
        for member in sorted(links, key=lambda link: link.issym()):
            try:
                archive.extract(member, target, filter="data")
            except tarfile.FilterError as error:
                raise UserError(f"{source}: {error}; this archive is not to be trusted") from error


# ---------------------------------------------------------------------------------------------------- pack


@dataclasses.dataclass(frozen=True)
class Packed:
    """One repository of an archive: its files with sha256, git or LFS name, and size in bytes."""

    repo: Repo
    revision: str
    commit: str
    files: dict[str, dict]
    tree: dict[str, dict] | None

    @property
    def size(self) -> int:
        return sum(entry["size"] for entry in self.files.values())

    def __str__(self) -> str:
        return (
            f"{self.repo} at {self.revision} ({self.commit[:12]}): {len(self.files)} files, {self.size / 1e6:,.1f} MB"
        )


def pack(names: tuple[str, ...], output: Path, revision: str = "main") -> list[Packed]:
    """Write repositories of the cache to one .tar, the manifest first; the file appears whole or not at all.

    Raises UserError for a repository that is not in the cache, or is damaged there.
    """
    parts = [describe(parse_repo(name), revision) for name in names]
    manifest = json.dumps({"format": 1, "repositories": [as_json(part) for part in parts]}, indent=1).encode()
    draft = output.with_name(output.name + ".incomplete")
    try:
        with tarfile.open(draft, "w:gz" if output.suffix == ".gz" else "w") as archive:
            head = tarfile.TarInfo(MANIFEST)
            head.size = len(manifest)
            archive.addfile(head, io.BytesIO(manifest))
            for part in parts:
                add_files(archive, part)
        draft.replace(output)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    return parts


def describe(repo: Repo, revision: str) -> Packed:
    snapshot = find_snapshot(repo, revision)
    if snapshot is None:
        raise UserError(f"{repo} at {revision} is not in the cache {repo.folder.parent}; see `hf cache ls`")
    if faults := list(verify_repo(repo)):
        raise UserError("not packed:\n" + "\n".join(f"  {fault}" for fault in faults))
    files = {
        name: {"sha256": sha256(path), "size": path.stat().st_size, "blob": path.resolve().name}
        for name, path in snapshot_files(snapshot).items()
    }
    return Packed(repo, revision, snapshot.name, files, read_tree(repo.folder, snapshot.name))


def as_json(part: Packed) -> dict:
    names = {"repo_id": part.repo.repo_id, "repo_type": part.repo.repo_type}
    return names | {"revision": part.revision, "commit": part.commit, "files": part.files, "tree": part.tree}


def add_files(archive: tarfile.TarFile, part: Packed) -> None:
    """Contents as ordinary files under REPOSITORY/COMMIT: archives without links can be opened everywhere."""
    snapshot = part.repo.folder / "snapshots" / part.commit
    for name in part.files:
        with (snapshot / name).open("rb") as file:
            member = archive.gettarinfo(fileobj=file, arcname=f"{part.repo.folder_name}/{part.commit}/{name}")
            member.type, member.linkname, member.uname, member.gname = tarfile.REGTYPE, "", "", ""
            member.size, member.uid, member.gid = part.files[name]["size"], 0, 0
            archive.addfile(member, file)


def unpack(archive: Path, move_ref: bool = False) -> list[Packed]:
    """Put what `pack` wrote into the cache. Raises UserError, before anything is there, where a file is not its hash."""
    with opened(archive) as folder:
        parts = read_manifest(archive, folder)
        for part in parts:
            check_unpacked(archive, folder, part)
        for part in parts:
            publish_packed(folder, part, move_ref)
    return parts


def read_manifest(archive: Path, folder: Path) -> list[Packed]:
    """What an archive says it holds. Raises UserError for one that `pack` has not written."""
    try:
        items = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["repositories"]
        parts = []
        for item in items:
            repo = parse_repo(item["repo_id"], item["repo_type"])
            check_tree(item["tree"] or {})
            parts.append(Packed(repo, item["revision"], item["commit"], item["files"], item["tree"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{archive} was not written by `hub.py pack`; use `hub.py import {archive} --repo_id ...`"
        ) from error
    for part in parts:
        plain = COMMIT.fullmatch(part.commit) and not Path(part.revision).is_absolute() and ".." not in part.revision
        inside = all(
            not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in part.files
        )
        if not (plain and inside and part.repo.repo_type in ("model", "dataset")):
            raise UserError(f"{archive}: the manifest names files outside of the cache; not to be trusted")
    return parts


def check_unpacked(archive: Path, folder: Path, part: Packed) -> None:
    for name, entry in part.files.items():
        path = folder / part.repo.folder_name / part.commit / name
        if not path.is_file() or path.is_symlink():
            raise UserError(f"{archive}: {part.repo} lacks {name}; nothing was changed")
        if sha256(path) != entry["sha256"]:
            raise UserError(f"{archive}: {name} of {part.repo} is not what the manifest says; nothing was changed")
        if has_name(path, entry["blob"]) is not True:
            raise UserError(f"{archive}: {name} of {part.repo} has a wrong name in the manifest; nothing was changed")


def publish_packed(folder: Path, part: Packed, move_ref: bool) -> None:
    """One repository, checked already, into the cache."""
    files = {name: folder / part.repo.folder_name / part.commit / name for name in part.files}
    with lock_repo(part.repo), staging_folder(part.repo) as root, writing():
        staged = root / part.repo.folder_name
        (staged / "blobs").mkdir(parents=True)
        names = {name: entry["blob"] for name, entry in part.files.items()}
        for name, path in files.items():
            if not (staged / "blobs" / names[name]).exists():
                path.replace(staged / "blobs" / names[name])
        finish_entry(staged, Provenance("archive", files, tree=part.tree), names, part.commit, part.revision)
        publish_entry(staged, part.repo, move_ref)
