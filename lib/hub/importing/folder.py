"""A downloaded folder or archive becomes a repository in the Hugging Face cache, as if the Hub's library had put it there."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from lib.config.hub import ImportConfig
from lib.errors import UserError, printable
from lib.hub.cache.contents import POINTER, file_damage, git_hash, is_lfs, matches_hash
from lib.hub.cache.files import OPTIONAL_FILES, TOKENIZER_FILES, is_adapter, missing_parts, missing_shards
from lib.hub.cache.layout import COMMIT, Repo, is_false_name, parse_repo
from lib.hub.cache.publish import lock_repo, publish_entry, staging_folder, writing
from lib.hub.importing.archives import opened
from lib.hub.importing.load_check import check_loads
from lib.hub.importing.provenance import Provenance, read_provenance, read_sha256_list
from lib.hub.needs import named_base
from lib.runtime.atomic import link_file, sha256, umask, write_atomically

COPIED = re.compile(r"\s*(\(\d+\)|- (Copy|副本))(?=\.|$)|[?_]download=true$|(?<=\.json)\.txt$")
"""What copies of a file, and downloads by wget or a text window, have in their names."""
UNKNOWN = "00000000"
"""The first digits of a commit made up from the contents, where the real one is not known."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did. `unproven` files had no hash to compare with; `missing` ones are on the list of all files."""

    repo: Repo
    revision: str
    commit: str
    layout: str
    files: int
    size: int
    unproven: tuple[str, ...]
    missing: tuple[str, ...]
    base: str | None
    loaded: bool

    def __str__(self) -> str:
        known = " (made up from the contents, the real one is not known)" if self.commit.startswith(UNKNOWN) else ""
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
        flag, at = ("--model", "--model_revision") if self.repo.repo_type == "model" else ("--dataset", "--revision")
        revision = "" if self.revision == "main" else f" {at} {self.revision}"
        script = 'predict.py "a text"' if self.base else "train.py"
        loaded = "   # loaded once offline" if self.loaded else ""
        rows["use"] = f"python {script} {flag} {self.repo.repo_id}{revision}{loaded}"
        return "\n".join(f"{name:<10} {printable(text)}" for name, text in rows.items())


def few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def import_source(config: ImportConfig) -> Imported:
    """Check the files of a folder or archive, load them offline in a fresh process, and add them to the cache.

    Nothing is added unless all of that succeeds. Importing again changes nothing; two imports at once are safe. Raises
    UserError for files that are damaged, missing, or in conflict with the cache.
    """
    repo, revision = parse_repo(config.repo_id, config.repo_type), config.revision
    if config.commit and not COMMIT.fullmatch(config.commit):
        raise UserError(f"--commit {config.commit}: expected the full commit, 40 hexadecimal digits")
    if not revision or ".." in Path(revision).parts or Path(revision).is_absolute():
        raise UserError(f"--revision {revision}: expected the name of a branch or tag, such as main")
    with opened(Path(config.source)) as folder:
        known = read_provenance(folder, repo, revision)
        if config.commit:
            known = dataclasses.replace(known, commit=config.commit)
        if config.sha256:
            known = dataclasses.replace(known, hashes=read_sha256_list(Path(config.sha256)))
            if not set(known.hashes) & set(known.files):
                raise UserError(
                    f"--sha256 {config.sha256} names no file of {folder}; make it there: sha256sum * > LIST"
                )
        if faults := find_faults(known, repo, config.allow_pickle):
            raise UserError("\n  ".join([f"{repo} cannot be imported, nothing was changed:", *faults]))
        commit = add_to_cache(known, repo, revision, config.move_ref, config.load_check)
        base = None
        if is_adapter(known.files):
            base = named_base(json.loads(known.files["adapter_config.json"].read_text(encoding="utf-8")))[0]
        return Imported(
            repo,
            revision,
            commit,
            known.layout,
            files=len(known.files),
            size=sum(path.stat().st_size for path in known.files.values()),
            unproven=known.unproven,
            missing=tuple(sorted(set(known.tree or {}) - set(known.files))),
            base=base,
            loaded=config.load_check,
        )


def find_faults(known: Provenance, repo: Repo, allow_pickle: bool) -> list[str]:
    """Every file that is damaged or missing, one sentence each."""
    files = known.files
    faults = [f"{name} {fault}" for name, path in files.items() if (fault := file_damage(path, name))]
    faults += [f"{name} is missing; download it" for name in missing_shards(files)]
    for name in sorted(set(files) & set(known.tree or {})):
        path, listed = files[name], (known.tree or {})[name]["size"]
        size = path.stat().st_size
        if size == listed or file_damage(path, name):
            continue
        fault, fix = "is cut off" if size < listed else "is not the listed file", "download it again"
        if size < 10_000_000 and size - path.read_bytes().count(b"\r\n") == listed:
            fault, fix = "has Windows line ends", "clone with `git clone -c core.autocrlf=false`"
        faults.append(f"{name} {fault}: {size:,} of {listed:,} bytes; {fix}")
    missing = missing_parts(files, repo.repo_type, allow_pickle)
    if not faults and missing:
        pickled = any(name.endswith(".bin") for name in files) and any("weights" in part for part in missing)
        hint = "; its weights are pickled, which can run programs: if you trust them, --allow_pickle" if pickled else ""
        found = ", ".join(sorted(files)[:8]) or "nothing"
        kind = "a model" if repo.repo_type == "model" else "a data set"
        faults = [f"it lacks {', '.join(missing)} to be {kind} (found: {found}){hint}"]
        for name in sorted(files):
            plain = COPIED.sub("", name).lower()
            if plain in ("config.json", "model.safetensors", *TOKENIZER_FILES) and plain not in files:
                faults.append(f"{name!r} looks like {plain} under another name; rename it")
    return faults


def add_to_cache(known: Provenance, repo: Repo, revision: str, move_ref: bool, load_check: bool) -> str:
    """Build an entry beside the cache, compare its files with their hashes, load it, publish it; returns its commit.

    Raises UserError for a file of another hash, and as `check_loads` and `publish_entry` do.
    """
    with lock_repo(repo), staging_folder(repo) as root, writing():
        staged = root / repo.folder_name
        names = stage_files(known, staged)
        commit = known.commit
        if commit is None:  # made up: the same for the same files
            text = "".join(f"{name}\0{blob}\n" for name, blob in sorted(names.items()))
            commit = UNKNOWN + hashlib.sha1(text.encode()).hexdigest()[len(UNKNOWN) :]
        if is_false_name(revision, commit):
            raise UserError(
                f"--revision {revision} reads as a commit, and these files are those of {commit}; give the name of a branch "
                "or tag, such as main"
            )
        finish_entry(known, staged, names, commit, revision)
        if load_check:
            check_loads(root, repo, revision, staged / "snapshots" / commit)
        publish_entry(staged, repo, move_ref)
    return commit


def stage_files(known: Provenance, staged: Path) -> dict[str, str]:
    """Link, or copy, all files to `staged`/blobs under their hashes; returns the hash of each.

    Raises UserError for a file that does not match the hash from its source, and for a disk without space.
    """
    attributes = known.files.get(".gitattributes")
    text = attributes.read_text(encoding="utf-8", errors="replace") if attributes else None
    (staged / "blobs").mkdir(parents=True)
    size, free = sum(path.stat().st_size for path in known.files.values()), shutil.disk_usage(staged).free
    names = {}
    for name, path in known.files.items():
        draft, source, mode = staged / "blobs" / "draft", path.resolve(), 0o666 & ~umask()
        # A hard link keeps its permissions: only where others can read it, as they could a new file.
        if source.stat().st_mode & mode != mode or not link_file(source, draft):
            if size > free:
                raise UserError(
                    f"{size / 1e9:.1f} GB are to be copied into the cache, {free / 1e9:.1f} GB are free there"
                )
            shutil.copyfile(path, draft)
        for wanted in filter(None, (known.names.get(name), known.hashes.get(name))):
            if matches_hash(draft, wanted) is not True:
                found = sha256(draft) if len(wanted) == 64 else git_hash(draft)
                raise UserError(
                    f"{name} is not the file that its source names: expected {wanted[:16]}..., found {found[:16]}...; "
                    "it was altered, nothing was changed; download it again"
                )
        blob = known.names.get(name)
        if blob is None:
            blob = sha256(draft) if is_lfs(name, draft.stat().st_size, text) else git_hash(draft)
        os.replace(draft, staged / "blobs" / blob)
        names[name] = blob
    return names


def finish_entry(known: Provenance, staged: Path, names: dict[str, str], commit: str, revision: str) -> None:
    """The symlinks of the snapshot, the list of all files where it is known, and the ref."""
    snapshot = staged / "snapshots" / commit
    for name, blob in names.items():
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(staged / "blobs" / blob, path.parent)
        try:
            os.symlink(target, path)
        except OSError:  # a file system without symlinks: there the cache has plain files
            shutil.copyfile(staged / "blobs" / blob, path)
    tree = known.tree
    if tree is not None:
        for name in set(OPTIONAL_FILES) - set(tree):
            write_atomically(staged / ".no_exist" / commit / name, "")
    elif commit.startswith(UNKNOWN):  # the commit is what was imported, so these are all files
        tree = {name: tree_entry(staged / "blobs" / blob, blob) for name, blob in names.items()}
    if tree is not None:
        listed = {"format_version": 1, "files": dict(sorted(tree.items()))}
        write_atomically(staged / "trees" / f"{commit}.json", json.dumps(listed, indent=1))
    if revision != commit:
        write_atomically(staged / "refs" / revision, commit)


def tree_entry(blob: Path, name: str) -> dict:
    """The entry of a file in the list of all files; for LFS, `blob_id` is git's hash of the pointer."""
    size = blob.stat().st_size
    if len(name) == 40:
        return {"size": size, "blob_id": name}
    pointer = f"{POINTER}v1\noid sha256:{name}\nsize {size}\n".encode()
    oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    return {"size": size, "blob_id": oid, "lfs_sha256": name, "lfs_size": size}
