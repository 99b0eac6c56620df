"""Whether a repository in the cache is what was downloaded: contents against hashes, without network."""

import os
from collections.abc import Iterator

from lib.hub.cache.contents import file_damage, matches_hash
from lib.hub.cache.files import missing_shards
from lib.hub.cache.layout import Repo, blob_name, false_refs, read_tree, snapshot_files


def verify_repo(repo: Repo) -> Iterator[str]:
    """Every fault of a repository in the cache, one sentence each; reads all contents once."""
    folder = repo.folder
    snapshots = {path: snapshot_files(path) for path in sorted((folder / "snapshots").glob("*")) if path.is_dir()}
    if not snapshots:
        yield f"{repo}: no snapshot in {folder}"
    for name in false_refs(folder):
        yield f"{repo}: refs/{name} gives the name of a commit to another one; it is ignored here, remove it"
    refs = [path for path in sorted((folder / "refs").rglob("*")) if path.is_file()]
    contents = {path: path.read_text(encoding="utf-8", errors="replace")[:200] for path in refs}
    for path, text in contents.items():
        name, main = path.relative_to(folder).as_posix(), path == folder / "refs" / "main"
        # Another ref than main may be left over: it hides nothing if its snapshot is gone, or has a good ref.
        lost = (folder / "snapshots" / text.strip()).is_dir() and text.strip() not in contents.values()
        if not main and (not lost or not text.strip()):
            continue
        if text != text.strip():
            yield f"{repo}: {name} ends with a newline, which hides the entry; run: printf %s {text.strip()} > {path}"
        elif not (folder / "snapshots" / text).is_dir():
            yield f"{repo}: {name} names the commit {text[:12]}, which has no snapshot"
    for blob in sorted((folder / "blobs").glob("*")):
        if blob.suffix != ".incomplete" and matches_hash(blob, blob.name) is False:
            pairs = [pair for files in snapshots.values() for pair in files.items()]
            users = sorted({name for name, path in pairs if path.resolve() == blob.resolve()})
            yield f"{repo}: {', '.join(users) or 'a file'} is damaged: its content does not match blobs/{blob.name[:12]}"
    for snapshot, files in snapshots.items():
        tree, where = read_tree(folder, snapshot.name) or {}, f"{repo}@{snapshot.name[:12]}"
        for path in sorted(snapshot.rglob("*")):
            if path.is_symlink() and not path.exists():
                yield f"{where}: {path.relative_to(snapshot)} is a symlink to a missing file: {os.readlink(path)}"
        for name, path in files.items():
            if fault := file_damage(path, name):
                yield f"{where}: {name} {fault}"
            elif not path.is_symlink() and name in tree and matches_hash(path, blob_name(tree[name])) is False:
                yield f"{where}: {name} is damaged: its content does not match the repository's list of files"
        for name in missing_shards(files):
            yield f"{where}: {name} is missing"


def has_no_ref(repo: Repo) -> bool:
    """Whether no branch or tag names a snapshot of a repository, as after the download of a pinned commit."""
    return not any(path.is_file() for path in (repo.folder / "refs").rglob("*"))
