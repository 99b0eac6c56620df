"""A folder of files becomes an entry of the Hugging Face cache, as if it had been downloaded."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.config import UserError
from lib.endpoint import offline_environment
from lib.hub_cache import COMMIT, Repo, lock_repo, locks_folder, publish_entry, snapshot_files, umask, write_whole
from lib.hub_files import OPTIONAL_FILES, damage, git_hash, has_name, is_lfs, missing_parts, missing_shards
from lib.hub_needs import read_card
from lib.manifest import sha256
from lib.provenance import Provenance, read_provenance, read_sha256_list

UNKNOWN = "00000000"
"""What the commit begins with when nobody told it: eight zeros, then a hash of names and contents."""

LOAD_MODEL = """
import sys
from transformers import AutoConfig, AutoModel, AutoTokenizer
for kind, more in ((AutoConfig, {}), (AutoTokenizer, {}), (AutoModel, {"dtype": "auto"})):
    kind.from_pretrained(sys.argv[1], revision=sys.argv[2], trust_remote_code=False, **more)
"""
LOAD_DATASET = """
import sys
from lib.config import UserError
from lib.sources import load_hub
try:
    load_hub(sys.argv[1], sys.argv[3] or None, sys.argv[2])
except UserError as error:
    sys.exit(str(error).splitlines()[0])
"""


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did; `verified`: every file has the hash that its source gave it."""

    repo: Repo
    revision: str
    commit: str
    layout: str
    verified: bool
    files: int
    size: int
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        known = "" if not self.commit.startswith(UNKNOWN) else " (made up from the contents, the real one is not known)"
        rows = {
            "imported": f"{self.repo}, {self.files} files, {self.size / 1e6:,.1f} MB, from a {self.layout}",
            "revision": f"{self.revision} = commit {self.commit}{known}",
            "contents": "verified: every file has the hash its source gave it"
            if self.verified
            else "unverified: nothing came with the files to compare them with (--sha256 LIST would)",
        }
        if self.missing:
            rows["not there"] = f"{', '.join(self.missing[:6])}{', ...' if len(self.missing) > 6 else ''}"
        return "\n".join(f"{name:<10} {text}" for name, text in rows.items())


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
    check_files(folder, known, repo, allow_pickle)
    with lock_repo(repo), staging_folder(repo) as root:
        staged = root / repo.folder_name
        names = stage_files(known, staged)
        commit = commit or known.commit or unknown_commit(names)
        finish_entry(staged, known, names, commit, revision)
        if load_check:
            check_loads(root, repo, revision, staged / "snapshots" / commit)
        publish_entry(staged, repo, move_ref)
    size = sum(path.stat().st_size for path in known.files.values())
    lacking = tuple(sorted(set(known.tree or {}) - set(known.files)))
    return Imported(repo, revision, commit, known.layout, known.verified, len(known.files), size, lacking)


def check_files(folder: Path, known: Provenance, repo: Repo, allow_pickle: bool) -> None:
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
        faults = [f"it lacks {', '.join(lacking)} to be {kind} (found: {found}){hint}"]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise UserError(f"{folder} cannot be imported as {repo}, nothing was changed:\n{listed}")


def size_faults(known: Provenance) -> Iterator[str]:
    for name, entry in (known.tree or {}).items():
        if name in known.files and (size := known.files[name].stat().st_size) != entry["size"]:
            fault = "is cut off" if size < entry["size"] else "is not the listed file"
            if not damage(known.files[name], name):
                yield f"{name} {fault}: {size:,} of {entry['size']:,} bytes; download it again"


@contextlib.contextmanager
def staging_folder(repo: Repo) -> Iterator[Path]:
    """A folder on the file system of the cache that no reader looks at; gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=locks_folder(repo), prefix="staging-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    if has_name(path, wanted) is False:
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
    try:
        os.link(path, target)
    except OSError:
        return False
    return True


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
            write_whole(staged / ".no_exist" / commit / name, "")
    elif commit.startswith(UNKNOWN):  # this commit is what was imported, so the list is complete
        tree = {name: tree_entry(staged / "blobs" / blob, blob) for name, blob in names.items()}
    if tree is not None:
        write_whole(staged / "trees" / f"{commit}.json", tree_text(tree))
    if revision != commit:
        write_whole(staged / "refs" / revision, commit)


def tree_entry(blob: Path, name: str) -> dict:
    size = blob.stat().st_size
    if len(name) == 40:
        return {"size": size, "blob_id": name}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{name}\nsize {size}\n".encode()
    oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    return {"size": size, "blob_id": oid, "lfs_sha256": name, "lfs_size": size}


def tree_text(tree: dict[str, dict]) -> str:
    return json.dumps({"format_version": 1, "files": dict(sorted(tree.items()))}, indent=1)


def check_loads(root: Path, repo: Repo, revision: str, snapshot: Path) -> None:
    """Load the entry in a fresh process that has no network; raise UserError with its reason when it does not load."""
    code = LOAD_MODEL if repo.repo_type == "model" else LOAD_DATASET
    configs = read_card(snapshot / "README.md").get("configs") if repo.repo_type == "dataset" else None
    first = str(configs[0].get("config_name", "")) if isinstance(configs, list) and len(configs) > 1 else ""
    command = [sys.executable, "-c", code, repo.repo_id, revision, first]
    place: dict[str, Any] = {"env": offline_environment(root), "cwd": Path(__file__).resolve().parent.parent}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **place)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{repo} does not load from these files, nothing was changed: {reason}\n"
            f"Files: {', '.join(snapshot_files(snapshot))}. To import it all the same: --load_check False"
        )
