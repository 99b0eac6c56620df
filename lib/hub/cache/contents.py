"""The content of one file: the hash that the Hub names it by, and the signs that it is damaged."""

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lib.runtime.atomic import sha256

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""Names of blobs: git's sha1 of a file, or the sha256 of a file in LFS."""
LFS_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".pkl", ".gguf"),
    *(".parquet", ".arrow", ".npy", ".npz", ".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".model"),
}
"""Suffixes that the Hub's default .gitattributes puts into LFS."""
LFS_SIZE = 10 * 1024 * 1024
"""Files above this size, in bytes, are always in LFS."""
OBJECTS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("adapter_config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
)
"""Files that hold a JSON object."""
POINTER = "version https://git-lfs.github.com/spec/"
"""How a git-LFS pointer begins: the small text that git keeps in the place of a file in LFS."""
ANSWERS = (b"Access to ", b"Entry not found", b"Repository not found", b"Invalid username", b"Invalid rev id")
"""How the Hub's error messages begin. wget and curl save them under the name of the requested file."""


def settings_damage(name: str, content: Any) -> str | None:
    """What is wrong with the content of one of OBJECTS; None when nothing is."""
    if not isinstance(content, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(content), f"the number {content}")
        return f"holds {kind}, not an object with settings ({{...}})"
    if name.endswith(".index.json"):
        shards = content.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            return "names no weights (weight_map)"
    return None


def git_hash(path: Path) -> str:
    """git's hash of a file, 40 hex digits, as `git hash-object` prints it; reads the file in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % path.stat().st_size)).hexdigest()


def matches_hash(path: Path, digest: str) -> bool | None:
    """Whether a file has a git hash (40 digits) or sha256 (64 digits); None when `digest` is neither."""
    if not HASH.fullmatch(digest):
        return None
    return (sha256(path) if len(digest) == 64 else git_hash(path)) == digest


def is_lfs(name: str, size: int, attributes: str | None = None) -> bool:
    """Whether the Hub keeps a file of `size` bytes in LFS: as .gitattributes says, else by its suffix."""
    if size > LFS_SIZE:
        return True
    if attributes is None:
        return Path(name).suffix.lower() in LFS_SUFFIXES
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    return any(Path(name).match(pattern.removeprefix("/").replace("**/", "")) for pattern in patterns)


def file_damage(path: Path, name: str) -> str | None:
    """What is wrong with the file called `name`, seen without reading all of it; None when nothing is.

    Recognizes git-LFS pointers, web pages and other error messages of servers, invalid JSON, and truncated safetensors,
    parquet and zipped .bin files.
    """
    size, suffix = path.stat().st_size, Path(name).suffix.lower()
    with path.open("rb") as file:
        head = file.read(512).removeprefix(b"\xef\xbb\xbf")
        file.seek(max(0, size - 4))
        tail = file.read()
    if head.startswith(POINTER.encode()):
        return "is a git-LFS pointer, not the file itself; run `git lfs pull` in the clone, or download the file"
    if suffix not in (".html", ".htm", ".md") and head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file itself: the server answered with an error or login page; download it again"
    if size < 1000 and suffix != ".md" and head.startswith(ANSWERS):
        text = head.decode(errors="replace").splitlines()[0][:80]
        return f"is an error message of the server, not the file itself: {text!r}; download it again"
    if size == 0 and (suffix in LFS_SUFFIXES or suffix == ".json"):
        return "is empty; download it again"
    if suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                return None
        except SafetensorError as error:
            return f"is cut off, or not a safetensors file ({size:,} bytes; {error}); download it again"
    if suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except RecursionError:
            return "is nested too deeply to be read; download it again"
        except ValueError as error:
            return f"is not JSON ({error}); download it again"
        if Path(name).name in OBJECTS and (damage := settings_damage(name, content)):
            return f"{damage}; download it again"
    if suffix == ".parquet" and not (head[:4] == b"PAR1" and tail == b"PAR1"):
        return f"is cut off, or not a parquet file ({size:,} bytes); download it again"
    if suffix in (".bin", ".pt", ".pth") and head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return f"is cut off after {size:,} bytes; download it again"
    return None
