"""Folders written whole or not at all: built aside, listed in a manifest with size and sha256, published by one rename."""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lib.errors import UserError, first_line

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What Python, PyTorch and safetensors raise when the disk is full."""
MANIFEST = "manifest.json"


def write_manifest(folder: Path, record: dict[str, Any], before: Path | None = None) -> None:
    """Write manifest.json: `record`, then every file below `folder` with its size and sha256.

    A file that is a hard link to the one of the same name in the folder `before` gets the entry it has there; it is not
    read again.
    """
    linked = {} if before is None else linked_entries(folder, before)
    files = {name: linked.get(name) or describe_file(folder / name) for name in file_names(folder)}
    text = json.dumps(record | {"files": files}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def describe_file(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def linked_entries(folder: Path, before: Path) -> dict[str, Any]:
    """The entries that the manifest of `before` has for files which `folder` shares as hard links; empty if unreadable.

    This is also safer than hashing them again: a bit that flips on the disk in between is still noticed later.
    """
    try:
        files = json.loads((before / MANIFEST).read_text(encoding="utf-8"))["files"]
        shared = [name for name in file_names(folder) if name in files and (before / name).is_file()]
        return {name: files[name] for name in shared if os.path.samefile(folder / name, before / name)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def file_names(folder: Path) -> list[str]:
    """All files below `folder` but its manifest, as sorted relative paths with slashes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a published folder, in words; None if every file matches its manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry['size']:,}"
            if sha256(path) != entry["sha256"]:
                return f"{name} was changed: its sha256 is not that of the manifest"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return str(error)
    return None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all, with the permissions of a new file; a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    os.chmod(draft, 0o666 & ~umask())
    os.replace(draft, path)


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def publish_folder(fresh: Path, target: Path) -> None:
    """Rename the folder `fresh` to `target` and flush it to the disk; a folder of that name is replaced and removed."""
    for path in [*fresh.rglob("*"), fresh]:
        sync(path)
    if target.exists():
        if not exchange(fresh, target):
            old = target.with_name(f".old-{target.name}")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
            os.rename(fresh, target)
            fresh = old
        sync(target.parent)
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        os.rename(fresh, target)
        sync(target.parent)
    shutil.rmtree(target.with_name(f".old-{target.name}"), ignore_errors=True)


def make_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Publish what `fill` writes into an empty folder: whole, with a manifest, and open to others as the umask allows.

    The folder of `target` must be there.
    """
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent, ignore_cleanup_errors=True) as name:
        draft = Path(name)
        fill(draft)
        write_manifest(draft, {})
        draft.chmod(0o777 & ~umask())
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
                shutil.rmtree(manifest.parent, ignore_errors=True)
    for path in folder.glob(".tmp-*"):  # of a run that was killed
        if time.time() - modified(path) > 86_400:
            shutil.rmtree(path, ignore_errors=True)


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


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder; weights become hard links where the file system has them, other files copies, as people edit them."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors" or not link_file(path, copy):
            shutil.copyfile(path, copy)


def explain(error: Exception, folder: Path) -> str:
    """A failed write in words, with the free space: the libraries' errors for a full disk do not mention the disk."""
    if isinstance(error, UserError):
        return str(error)
    free = shutil.disk_usage(folder).free / 2**20
    return (
        f"{first_line(error)} ({free:,.0f} MiB are free at {folder}); when there is room, run the same command again: it "
        "resumes from the previous checkpoint"
    )


def finite(value: Any) -> Any:
    """`value` for JSON, which has no NaN: floats that are not finite, also nested ones, become "NaN" or "±Infinity"."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
