"""A folder of files becomes an entry of the Hugging Face cache, as if it had been downloaded."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib.errors import UserError
from lib.hub.cache.files import (
    OPTIONAL_FILES,
    TOKENIZER_FILES,
    damage,
    git_hash,
    has_name,
    is_adapter,
    is_lfs,
    missing_parts,
    missing_shards,
)
from lib.hub.cache.layout import COMMIT, Repo
from lib.hub.cache.publish import lock_repo, publish_entry, staging_folder, writing
from lib.hub.importing.load_check import check_loads
from lib.hub.importing.provenance import Provenance, read_provenance, read_sha256_list
from lib.hub.needs import named_base
from lib.runtime.atomic import link_file, sha256, umask, write_atomically

REFUSED = "cannot be imported, nothing was changed:"
COPIED = re.compile(r"\s*(\(\d+\)|- (Copy|副本))(?=\.|$)|[?_]download=true$|(?<=\.json)\.txt$")
"""What copies, and downloads by wget or from a text window, have in their names."""
UNKNOWN = "00000000"
"""What the commit begins with when nobody told it: eight zeros, then a hash of names and contents."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did; verified: every file has the hash that its source gave it, but for those that are `unproven`."""

    repo: Repo
    revision: str
    commit: str
    layout: str
    unproven: tuple[str, ...]
    files: int
    size: int
    missing: tuple[str, ...] = ()
    base: str | None = None

    @property
    def verified(self) -> bool:
        return not self.unproven

    def __str__(self) -> str:
        known = "" if not self.commit.startswith(UNKNOWN) else " (made up from the contents, the real one is not known)"
        rows = {
            "imported": f"{self.repo}, {self.files} files, {self.size / 1e6:,.1f} MB, from a {self.layout}",
            "revision": f"{self.revision} = commit {self.commit}{known}",
            "contents": "verified: every file has the hash its source gave it",
        }
        if len(self.unproven) == self.files:
            rows["contents"] = "unverified: nothing came with the files to compare them with (--sha256 LIST would)"
        elif self.unproven:
            rows["contents"] = f"unverified: there is no hash for {few(self.unproven)}; the others are verified"
        if self.missing:
            rows["not there"] = few(self.missing)
        if self.base:
            rows["base"] = f"{self.base}, which this adapter needs as well"
        return "\n".join(f"{name:<10} {text}" for name, text in rows.items())


def few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def import_folder(
    folder: Path,
    repo: Repo,
    revision: str = "main",
    commit: str | None = None,
    sha256_list: Path | None = None,
    allow_pickle: bool = False,
    move_ref: bool = False,
    load_check: bool = True,
    known: Provenance | None = None,
) -> Imported:
    """Check the files of `folder`, build an entry beside the cache, load it offline in a fresh process, publish it.

    Nothing is published unless all of that succeeds; doing it again changes nothing; two at once are safe. `known` takes
    the place of what the folder tells. Raises UserError for what is damaged, missing, or in conflict with the cache.
    """
    if commit and not COMMIT.fullmatch(commit):
        raise UserError(f"--commit {commit}: expected the full commit, 40 hexadecimal digits")
    if not revision or ".." in Path(revision).parts or Path(revision).is_absolute():
        raise UserError(f"--revision {revision}: expected the name of a branch or tag, such as main")
    known = known or read_provenance(folder, repo, revision)
    if sha256_list:
        known = dataclasses.replace(known, hashes=read_sha256_list(sha256_list))
        if not set(known.hashes) & set(known.files):
            raise UserError(f"--sha256 {sha256_list} names no file of {folder}; make it there: sha256sum * > LIST")
    check_files(known, repo, allow_pickle)
    with lock_repo(repo), staging_folder(repo) as root, writing():
        staged = root / repo.folder_name
        names = stage_files(known, staged)
        commit = commit or known.commit or unknown_commit(names)
        finish_entry(staged, known, names, commit, revision)
        if load_check:
            check_loads(root, repo, revision, staged / "snapshots" / commit)
        publish_entry(staged, repo, move_ref)
    size = sum(path.stat().st_size for path in known.files.values())
    lacking = tuple(sorted(set(known.tree or {}) - set(known.files)))
    unproven, base = known.unproven, adapter_base(known) if is_adapter(known.files) else None
    return Imported(repo, revision, commit, known.layout, unproven, len(known.files), size, lacking, base)


def adapter_base(known: Provenance) -> str | None:
    return named_base(json.loads(known.files["adapter_config.json"].read_text(encoding="utf-8")))[0]


def check_files(known: Provenance, repo: Repo, allow_pickle: bool) -> None:
    """Raise UserError naming every file that is damaged or missing."""
    faults = [f"{name} {fault}" for name, path in known.files.items() if (fault := damage(path, name))]
    faults += [f"{name} is missing; download it" for name in missing_shards(known.files)]
    faults += size_faults(known)
    lacking = missing_parts(known.files, repo.repo_type, allow_pickle)
    if not faults and lacking:
        pickled = any(name.endswith(".bin") for name in known.files) and any("weights" in part for part in lacking)
        hint = "; its weights are pickled, which can run programs: if you trust them, --allow_pickle" if pickled else ""
        found = ", ".join(sorted(known.files)[:8]) or "nothing"
        kind = "a model" if repo.repo_type == "model" else "a data set"
        faults = [f"it lacks {', '.join(lacking)} to be {kind} (found: {found}){hint}", *renamed_files(known.files)]
    if faults:
        raise UserError("\n".join([f"{repo} {REFUSED}", *(f"  {fault}" for fault in faults)]))


def renamed_files(names: Iterable[str]) -> Iterator[str]:
    """Files that look like one of a model under another name, as browsers and net disks make of a second copy."""
    for name in sorted(names):
        plain = COPIED.sub("", name).lower()
        if plain in ("config.json", "model.safetensors", *TOKENIZER_FILES) and plain not in names:
            yield f"{name!r} looks like {plain} under another name; rename it"


def size_faults(known: Provenance) -> Iterator[str]:
    for name, entry in (known.tree or {}).items():
        if name in known.files and (size := known.files[name].stat().st_size) != entry["size"]:
            fault = "is cut off" if size < entry["size"] else "is not the listed file"
            mend = "download it again"
            if size - windows_lines(known.files[name], size) == entry["size"]:
                fault, mend = "has Windows line ends", "clone with `git clone -c core.autocrlf=false`"
            if not damage(known.files[name], name):
                yield f"{name} {fault}: {size:,} of {entry['size']:,} bytes; {mend}"


def windows_lines(path: Path, size: int) -> int:
    return path.read_bytes().count(b"\r\n") if size < 10_000_000 else 0


def stage_files(known: Provenance, staged: Path) -> dict[str, str]:
    """Put all files into `staged`/blobs under their hashes; return the hash of each.

    Raises UserError for a file whose content is not that of the name its source gave it.
    """
    attributes = known.files.get(".gitattributes")
    text = attributes.read_text(encoding="utf-8", errors="replace") if attributes else None
    (staged / "blobs").mkdir(parents=True)
    need, free = sum(path.stat().st_size for path in known.files.values()), shutil.disk_usage(staged).free
    names = {}
    for name, path in known.files.items():
        draft = staged / "blobs" / "draft"
        if not link(path, draft):
            if need > free:
                raise UserError(
                    f"{need / 1e9:.1f} GB are to be copied into the cache, {free / 1e9:.1f} GB are free there"
                )
            shutil.copyfile(path, draft)
        for wanted in filter(None, (known.names.get(name), known.hashes.get(name))):
            check_content(draft, name, wanted)
        blob = known.names.get(name) or hub_name(draft, name, text)
        os.replace(draft, staged / "blobs" / blob)
        names[name] = blob
    return names


def check_content(path: Path, name: str, wanted: str) -> None:
    if has_name(path, wanted) is not True:
        found = sha256(path) if len(wanted) == 64 else git_hash(path)
        raise UserError(
            f"{name} is not the file that its source names: expected {wanted[:16]}..., found {found[:16]}...; "
            "it was altered, nothing was changed; download it again"
        )


def hub_name(path: Path, name: str, attributes: str | None) -> str:
    return sha256(path) if is_lfs(name, path.stat().st_size, attributes) else git_hash(path)


def link(path: Path, target: Path) -> bool:
    """Hard-link a file whose permissions are those a new file would have; False where that is not possible."""
    path, mode = path.resolve(), 0o666 & ~umask()
    if path.stat().st_mode & mode != mode:
        return False
    return link_file(path, target)


def unknown_commit(names: dict[str, str]) -> str:
    """A made-up commit: the same for the same files, and recognisable by its zeros."""
    text = "".join(f"{name}\0{blob}\n" for name, blob in sorted(names.items()))
    return UNKNOWN + hashlib.sha1(text.encode()).hexdigest()[len(UNKNOWN) :]


def finish_entry(staged: Path, known: Provenance, names: dict[str, str], commit: str, revision: str) -> None:
    """Snapshot links, the list of files where it is complete, and the ref."""
    snapshot = staged / "snapshots" / commit
    for name, blob in names.items():
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(staged / "blobs" / blob, path.parent)
        try:
            os.symlink(target, path)
        except OSError:  # a file system without links: the cache then holds plain files
            shutil.copyfile(staged / "blobs" / blob, path)
    tree = known.tree
    if tree is not None:
        for name in set(OPTIONAL_FILES) - set(tree):
            write_atomically(staged / ".no_exist" / commit / name, "")
    elif commit.startswith(UNKNOWN):  # this commit is what was imported, so the list is complete
        tree = {name: tree_entry(staged / "blobs" / blob, blob) for name, blob in names.items()}
    if tree is not None:
        write_atomically(staged / "trees" / f"{commit}.json", tree_text(tree))
    if revision != commit:
        write_atomically(staged / "refs" / revision, commit)


def tree_entry(blob: Path, name: str) -> dict:
    size = blob.stat().st_size
    if len(name) == 40:
        return {"size": size, "blob_id": name}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{name}\nsize {size}\n".encode()
    oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    return {"size": size, "blob_id": oid, "lfs_sha256": name, "lfs_size": size}


def tree_text(tree: dict[str, dict]) -> str:
    return json.dumps({"format_version": 1, "files": dict(sorted(tree.items()))}, indent=1)
