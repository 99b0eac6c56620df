"""Files and folders written whole or not at all: built aside, flushed to the disk, published by one rename.

A folder has a manifest that lists its files with size and sha256. It is also the mark that the folder was written here:
one without it is somebody else's, and is never replaced or removed.
"""

import contextlib
import ctypes
import errno
import filecmp
import hashlib
import json
import math
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from lib.errors import UserError, first_line
from lib.runtime.watchdog import beat

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What Python, PyTorch and safetensors raise when the disk is full."""
NFS_SECONDS = 30.0
"""How long a machine may take to see what another one wrote to a shared disk: NFS looks at a folder every now and then."""
MANIFEST = "manifest.json"
MARK = json.dumps({"hash": "sha256", "files": {}}) + "\n"
"""The manifest of a folder that is being written."""

CHUNK = 2**20
"""Bytes that are read at once."""

Entries = dict[str, dict[str, Any]]
"""Files by their names, with size and sha256: what a manifest lists."""


class NotOurs(OSError):
    """What is in the way of a folder was not written here, and stays."""


def write_manifest(
    folder: Path, record: dict[str, Any], before: Path | None = None, known: Entries | None = None
) -> None:
    """Write manifest.json: `record`, then every file below `folder` with its size and sha256.

    A file that is a hard link to the one of the same name in the folder `before` gets the entry it has there, and one
    that is `known` already that entry; they are not read again. Those are waited for, since other machines may have written
    them. Raises UserError if one is not seen.
    """
    known = known or {}
    deadline = time.monotonic() + NFS_SECONDS
    while unseen := known.keys() - (names := file_names(folder)):
        if time.monotonic() >= deadline:
            raise UserError(
                f"{folder / min(unseen)} was written and is not seen {NFS_SECONDS:g} s later: it was deleted, or {folder.parent} "
                f"is not one folder for all machines; when that is mended, {RESUMES}"
            )
        time.sleep(min(0.5, NFS_SECONDS))
    linked = ({} if before is None else linked_entries(folder, before)) | known
    files = {name: linked.get(name) or describe_file(folder / name) for name in names}
    write_atomically(folder / MANIFEST, json.dumps(record | {"files": files}, indent=2, ensure_ascii=False) + "\n")


def describe_file(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def linked_entries(folder: Path, before: Path) -> Entries:
    """The entries that the manifest of `before` has for files which `folder` shares as hard links; empty if unreadable.

    This is also safer than hashing them again: a bit that flips on the disk in between is still noticed later.
    """
    with contextlib.suppress(OSError):
        files = listed_files(before)
        shared = [name for name in file_names(folder) if name in files and (before / name).is_file()]
        return {name: files[name] for name in shared if os.path.samefile(folder / name, before / name)}
    return {}


def listed_files(folder: Path) -> Entries:
    """The files that the manifest of a folder lists; none if it is missing or cannot be read as one."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        if isinstance(files, dict) and all({"size", "sha256"} <= entry.keys() for entry in files.values()):
            return files
    return {}


def file_names(folder: Path) -> list[str]:
    """All files below `folder` but its manifest, as sorted relative paths with slashes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            beat()
    return digest.hexdigest()


def find_damage(folder: Path, leaving_out: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a published folder, in words; None if every file matches its manifest.

    Files whose names begin as one of `leaving_out` are not looked at.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return find_difference(folder, {name: files[name] for name in files if not name.startswith(leaving_out)})
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return str(error)


def find_difference(folder: Path, files: Entries) -> str | None:
    """The first of `files` that `folder` does not hold as listed, in words; None if it holds all of them."""
    try:
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry['size']:,}"
            if sha256(path) != entry["sha256"]:
                return f"{name} was changed: its sha256 is not that of the manifest"
    except OSError as error:
        return str(error)
    return None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all, as `replacing` does; one that has this content already is not touched."""
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with contextlib.suppress(OSError):
        if not path.is_symlink() and path.read_bytes() == data:
            return
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Within, an open file that becomes `path` at the end: whole, on the disk, with the permissions of a new file.

    After an error `path` is what it was. A file with the same content is not touched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name[:40]}-")
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(handle, 0o666 & ~umask())
            os.fsync(handle)
        if not path.is_file() or path.is_symlink() or not filecmp.cmp(draft, path, shallow=False):
            os.replace(draft, path)
            sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def umask() -> int:
    """The permissions that new files do not get; read where the system shows them, since other threads write files too."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1], 8)
    value = os.umask(0)
    os.umask(value)
    return value


def is_ours(folder: Path) -> bool:
    """Whether a folder was written here: it has our manifest, perhaps a damaged one, or it is empty.

    A link is not, wherever it leads.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return not any(folder.iterdir())
    except OSError:
        return False
    try:
        files = json.loads(content)["files"]
    except (ValueError, LookupError, TypeError):
        begun = MARK.encode().startswith(content) and len(list(folder.iterdir())) == 1  # killed at its first write
        return begun or (b'"sha256"' in content and b'"size"' in content)
    return isinstance(files, dict) and all(isinstance(entry, dict) and "sha256" in entry for entry in files.values())


def remove_folder(folder: Path) -> bool:
    """Remove a folder that was written here; False if it was not, and is left alone.

    The manifest goes last: what a kill leaves is still known as ours.
    """
    if not is_ours(folder):
        return False
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MANIFEST:
                path.unlink(missing_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmdir()
    return True


def remove_drafts(folder: Path, names: Collection[str] = ()) -> None:
    """Remove what killed processes left in `folder`: unpublished or replaced folders, and drafts of the files `names`.

    Nobody else may be writing there.
    """
    for path in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
        if path.is_dir():
            remove_folder(path)
        elif (match := re.fullmatch(r"\.tmp-(.+)-[a-z0-9_]{8}", path.name)) and match[1] in names:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def drafting(target: Path) -> Iterator[Path]:
    """Within, a folder beside `target` to fill and to publish; what is not published is removed.

    It has a manifest from the first moment, by which a later start knows what a kill left, and is open to others as the
    umask allows. The folder of `target` must be there.
    """
    draft = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name[:40]}-", dir=target.parent))
    try:
        (draft / MANIFEST).write_text(MARK)
        draft.chmod(0o777 & ~umask())
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish_folder(fresh: Path, target: Path) -> None:
    """Rename the folder `fresh` to `target` and flush it to the disk; a folder of that name is replaced and removed.

    Raises NotOurs if what has the name was not written here.
    """
    for path in [*fresh.rglob("*"), fresh]:
        sync(path)
    if os.path.lexists(target):
        if not is_ours(target):
            raise NotOurs(f"{target} is in the way: it was not written by this program ({MANIFEST} is missing there)")
        if not exchange(fresh, target):
            old = Path(tempfile.mkdtemp(prefix=f".old-{target.name[:40]}-", dir=target.parent))
            os.rename(target, old)  # over the empty folder
            os.rename(fresh, target)
            fresh = old
        sync(target.parent)
        remove_folder(fresh)
    else:
        os.rename(fresh, target)
        sync(target.parent)


def make_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Publish what `fill` writes into a new folder: whole, with a manifest, and open to others as the umask allows.

    The folder of `target` must be there. What another process has published there meanwhile stays if it is whole: others
    may read it already, and over NFS a file that is removed cannot be read on.
    """
    with drafting(target) as draft:
        fill(draft)
        write_manifest(draft, {})
        if not (is_ours(target) and listed_files(target) and find_damage(target) is None):
            publish_folder(draft, target)


def remove_unused(folder: Path, limit: float, keep: Path | None = None) -> None:
    """Keep the most recently used published folders in `folder`, up to `limit` bytes in total, and `keep` in any case.

    The time of use is that of the manifest.
    """
    entries = sorted(folder.glob(f"[!.]*/{MANIFEST}"), key=modified, reverse=True)
    total = 0
    for manifest in entries:
        with contextlib.suppress(OSError):  # another process deletes as well
            total += sum(path.stat().st_size for path in manifest.parent.iterdir())
            if total > limit and manifest.parent != keep:
                remove_folder(manifest.parent)
    for path in folder.glob(".tmp-*"):  # of a run that was killed
        if time.time() - modified(path) > 86_400:
            remove_folder(path)


def modified(path: Path) -> float:
    """When a file was last written; now, if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def exchange(a: Path, b: Path) -> bool:
    """Swap the names of two folders in one system call; False where the system has none."""
    AT_FDCWD, RENAME_EXCHANGE = -100, 2
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    beat()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_file(source: Path, target: Path) -> bool:
    """Make a hard link; False where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    if not link_file(source, target):
        shutil.copyfile(source, target)


def copy_files(source: Path, target: Path, names: Collection[str], link: bool = False) -> None:
    """Copy files of a folder; with `link`, weights become hard links where the file system has them."""
    for name in names:
        beat()
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        put = link_or_copy if link and copy.suffix == ".safetensors" else shutil.copyfile
        put(source / name, copy)


AGAIN = "run the same command again"
RESUMES = f"{AGAIN}: it resumes from the previous checkpoint"


def explain(error: BaseException, folder: Path, advice: str = RESUMES) -> str:
    """A failed write in words, with its cause: the libraries' errors for a full disk do not mention the disk."""
    if isinstance(error, UserError | NotOurs):
        return str(error)
    if not folder.exists():
        return f"{folder} is gone: it was deleted or renamed in the meantime; move it back, or begin again in another folder"
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # of PyTorch
        error = error.__context__
    number = getattr(error, "errno", None)
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors
        number = int(found[1])
    free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free at {folder}"
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if number == errno.EFBIG and limit != resource.RLIM_INFINITY:
        free = f"the shell allows files of {limit / 2**10:,.0f} KiB; lift the limit with `ulimit -f unlimited`"
    elif number == errno.EDQUOT:
        free = f"your quota on the disk of {folder} is used up: `quota -s` shows it, where there is one; {free} for all"
    if number not in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # without a number, of a library, probably too
        return f"{first_line(error)}; when that is mended, {advice}"
    return f"{first_line(error)} ({free}); when there is room, {advice}"


@contextlib.contextmanager
def explaining(folder: Path, advice: str = RESUMES) -> Iterator[None]:
    """Within, an error of the disk becomes a UserError that says what happened, and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {explain(error, folder, advice)}") from error


def finite(value: Any) -> Any:
    """`value` for JSON, which has no NaN: floats that are not finite, also nested ones, become "NaN" or "±Infinity"."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
