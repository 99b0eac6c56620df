"""Models and data sets on disk: one repository in every layout in which it is copied around, and a small SST-5."""

import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.conftest import sentences
from tests.loopback_hub import LFS, blob_of, pointer_of, repository_files

COMMIT = "c0ffee" + "0" * 34


def browser(repository: Path, target: Path) -> Path:
    """Loose files, and files that an operating system leaves among them."""
    shutil.copytree(repository, target)
    for path in target.iterdir():
        path.chmod(0o644)
    (target / ".DS_Store").write_bytes(b"\0")
    (target / "._config.json").write_bytes(b"\0\5\x16\7")
    return target


def modelscope(repository: Path, target: Path) -> Path:
    """The files and the notes of the package modelscope, one of them a pickle that must not be opened."""
    shutil.copytree(repository, target)
    (target / "configuration.json").write_text('{"task": "text-classification"}')
    (target / ".mv").write_text("Revision:master,CreatedAt:1700000000")
    (target / ".msc").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    return target


def git_clone(repository: Path, target: Path) -> Path:
    """A clone after `git lfs pull`: pointers in the commit, contents in the folder."""
    target.mkdir(parents=True)
    files = repository_files(repository)
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS)
    for name, data in {**files, ".gitattributes": attributes.encode()}.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(pointer_of(data) if name.endswith(LFS) else data)
    git(target, "init", "-q")
    # git-lfs is not installed: the pointers are committed as they are, which gives the same commit.
    git(target, "-c", "filter.lfs.clean=cat", "-c", "filter.lfs.required=false", "add", ".")
    git(target, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "model")
    for name, data in files.items():
        (target / name).write_bytes(data)
    (target / "notes.txt").write_text("not part of the commit")
    return target


def local_dir(repository: Path, target: Path) -> Path:
    """A folder of `hf download --local-dir`: a record of commit and hash for each file, and the list of all files."""
    shutil.copytree(repository, target)
    notes = target / ".cache" / "huggingface"
    tree = {}
    for name, data in repository_files(repository).items():
        path = notes / "download" / f"{name}.metadata"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{COMMIT}\n{blob_of(name, data)}\n1700000000.0\n")
        tree[name] = tree_entry(name, data)
    tree["README.md"] = {"size": 3, "blob_id": "1" * 40}  # on the Hub, and not downloaded
    (notes / "trees").mkdir()
    (notes / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": tree}))
    return target


def tree_entry(name: str, data: bytes) -> dict:
    if not name.endswith(LFS):
        return {"size": len(data), "blob_id": blob_of(name, data)}
    pointer = blob_of("pointer", pointer_of(data))
    return {"size": len(data), "blob_id": pointer, "lfs_sha256": blob_of(name, data), "lfs_size": len(data)}


def cache_of_another_machine(repository: Path, target: Path) -> Path:
    """A folder models--user--name as huggingface_hub builds it."""
    for folder in ("blobs", f"snapshots/{COMMIT}", "refs"):
        (target / folder).mkdir(parents=True)
    for name, data in repository_files(repository).items():
        (target / "blobs" / blob_of(name, data)).write_bytes(data)
        path = target / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(target / "blobs" / blob_of(name, data), path.parent))
    (target / "refs" / "main").write_text(COMMIT)
    return target


def share_blobs(cache: Path) -> None:
    """Move the blobs in LFS where huggingface_hub keeps those of Xet: in a folder that all repositories share."""
    for number, blob in enumerate(sorted(cache.glob("*--*/blobs/*"))):
        if len(blob.name) == 64:
            shared = cache / "blobs" / "ab" / f"{number:064}"
            shared.parent.mkdir(parents=True, exist_ok=True)
            blob.rename(shared)
            blob.symlink_to(Path("../../blobs/ab") / shared.name)


def snapshot_of_another_machine(repository: Path, target: Path) -> Path:
    return cache_of_another_machine(repository, target) / "snapshots" / COMMIT


def zipped(repository: Path, target: Path) -> Path:
    """A .zip with a folder inside, as file managers make it."""
    path = target.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in repository_files(repository).items():
            archive.writestr(f"roberta/{name}", data)
    return path


def tarred(repository: Path, target: Path) -> Path:
    path = target.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(repository, arcname=".")
    return path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


LAYOUTS: dict[str, tuple[Callable[[Path, Path], Path], bool]] = {
    "browser": (browser, False),
    "modelscope": (modelscope, False),
    "git clone": (git_clone, True),
    "hf download": (local_dir, True),
    "cache entry": (cache_of_another_machine, True),
    "snapshot": (snapshot_of_another_machine, True),
    "zip": (zipped, False),
    "tar": (tarred, False),
}
"""How to make each layout, and whether it records the hashes of the contents."""


SST5_NAMES = ("very negative", "negative", "neutral", "positive", "very positive")


def write_sst5(folder: Path) -> None:
    """SST-5 in small, stored as the real one: JSON lines with label and label_text, no ClassLabel."""
    folder.mkdir(parents=True)
    for split, size, name in (("train", 40, "train"), ("validation", 20, "dev"), ("test", 20, "test")):
        rows = [
            {"text": f"{text} {split}", "label": i % 5, "label_text": SST5_NAMES[i % 5]}
            for i, (text, _) in enumerate(sentences(size))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def environment(endpoint: str, folder: Path) -> dict[str, str]:
    """Variables of a process that asks the Hub at `endpoint` and has its caches below `folder`."""
    caches = {
        "HF_HOME": str(folder / "hf"),
        "HF_DATASETS_CACHE": str(folder / "ds"),
        "HF_MODULES_CACHE": str(folder / "m"),
    }
    return caches | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
