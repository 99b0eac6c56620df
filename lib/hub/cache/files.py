"""One file of a repository: the names the Hub gives to content, and the ways in which a file carried by hand is broken."""

import hashlib
import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from lib.runtime.atomic import sha256

LFS_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".pkl", ".gguf"),
    *(".parquet", ".arrow", ".npy", ".npz", ".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".model"),
}
"""Suffixes that the Hub's own .gitattributes hands to LFS."""
LFS_SIZE = 10 * 1024 * 1024
"""Files above this size, in bytes, are always in LFS."""
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""The names of contents: a git hash, or a sha256 for what is in LFS."""
POINTER = b"version https://git-lfs.github.com/spec/"
ANSWERS = (b"Access to ", b"Entry not found", b"Repository not found", b"Invalid username", b"Invalid rev id")
"""How the Hub's answers begin that wget and curl save under the name of the file that was asked for."""
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def git_hash(path: Path) -> str:
    """The name git gives to a file's content: 40 hex digits, as `git hash-object` prints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % path.stat().st_size)).hexdigest()


def has_name(path: Path, name: str) -> bool | None:
    """Whether a file's content is that of `name`, a git or LFS hash; None when `name` is no hash."""
    if not HASH.fullmatch(name):
        return None
    return (sha256(path) if len(name) == 64 else git_hash(path)) == name


def is_lfs(name: str, size: int, attributes: str | None = None) -> bool:
    """Whether the Hub keeps a file in LFS: by the repository's .gitattributes where there is one, else by suffix and size."""
    if size > LFS_SIZE:
        return True
    if attributes is None:
        return Path(name).suffix.lower() in LFS_SUFFIXES
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    return any(Path(name).match(pattern.removeprefix("/").replace("**/", "")) for pattern in patterns)


def damage(path: Path, name: str) -> str | None:
    """What is wrong with a file's content, by its looks alone; None when nothing is seen.

    Knows git-LFS pointers, web pages and other answers of servers, empty and cut JSON, and cut safetensors, parquet and
    zipped .bin files.
    """
    size, suffix = path.stat().st_size, Path(name).suffix.lower()
    with path.open("rb") as file:
        head = file.read(512).removeprefix(b"\xef\xbb\xbf")
    if head.startswith(POINTER):
        return "is a git-LFS pointer, not the file itself; run `git lfs pull` in the clone, or download the file"
    if suffix not in (".html", ".htm", ".md") and head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file itself: the server answered with an error or login page; download it again"
    if size < 1000 and suffix != ".md" and head.startswith(ANSWERS):
        text = head.decode(errors="replace").splitlines()[0][:80]
        return f"is an answer of the server, not the file itself: {text!r}; download it again"
    if size == 0 and (suffix in LFS_SUFFIXES or suffix == ".json"):
        return "is empty; download it again"
    if suffix == ".safetensors":
        return safetensors_damage(path, size)
    if suffix == ".json":
        return json_damage(path)
    if suffix == ".parquet" and not (head[:4] == b"PAR1" and _tail(path) == b"PAR1"):
        return f"is not a whole parquet file ({size:,} bytes); download it again"
    if suffix in (".bin", ".pt", ".pth") and head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return f"is cut off after {size:,} bytes; download it again"
    return None


def safetensors_damage(path: Path, size: int) -> str | None:
    """Compare the length a safetensors header promises with the file's size in bytes."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                return "is not a safetensors file, or cut off in its header; download it again"
            header = json.loads(file.read(length))
        ends = [value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return "is not a safetensors file; download it again"
    promised = 8 + length + max(ends, default=0)
    if promised != size:
        return f"is cut off or altered: it has {size:,} of {promised:,} bytes; download it again"
    return None


def json_damage(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        return f"is not JSON ({error}); download it again"
    return None


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4))
        return file.read()


def missing_shards(files: Mapping[str, Path]) -> list[str]:
    """Names of weight files that an index or the numbering of the shards promises and that are not among `files`."""
    promised: set[str] = set()
    for name, path in files.items():
        if name.endswith((".safetensors.index.json", ".bin.index.json")):
            try:
                shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError):
                continue
            folder = name.rpartition("/")[0]
            promised |= {f"{folder}/{shard}" if folder else shard for shard in shards}
        if match := SHARD.fullmatch(name):
            stem, _, count, suffix = match.groups()
            if suffix in (".safetensors", ".bin", ".parquet"):
                promised |= {f"{stem}-{number:05}-of-{count}{suffix}" for number in first_to_last(name, int(count))}
    return sorted(promised - set(files))


def first_to_last(name: str, count: int) -> range:
    """The numbers of `count` shards: data sets count from 0, weights from 1."""
    return range(count) if name.endswith(".parquet") else range(1, count + 1)


# ---------------------------------------------------------------------------------------------------- what a run needs

NOT_NEEDED = {
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".pkl", ".gguf", ".npz", ".npy"),
    *(".safetensors", ".py", ".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".zip", ".gz", ".tar", ".parquet"),
}
DATA_SUFFIXES = {
    *(".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".txt", ".xml"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"),
}
TOKENIZER_FILES = {
    *("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("spm.model", "bpe.codes", "tokenizer_config.json"),
}
OPTIONAL_FILES = (
    *(
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "adapter_config.json",
    ),
    *("generation_config.json", "processor_config.json", "preprocessor_config.json", "model.safetensors.index.json"),
    *("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"),
)
"""Files that transformers asks for and that many models do not have."""


def weight_files(names: Iterable[str], allow_pickle: bool) -> list[str]:
    """The weights that would be loaded, index included: safetensors, else, where allowed, pickled .bin files."""
    top = [name for name in names if "/" not in name]
    safe = [name for name in top if re.fullmatch(r"(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors", name)]
    if safe:
        return sorted({*safe, *(name for name in top if name == "model.safetensors.index.json")})
    pickled = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?")
    return sorted(name for name in top if pickled.fullmatch(name)) if allow_pickle else []


ADAPTER_WEIGHTS = re.compile(
    r"adapter_model\.safetensors|(adapter|model_head|pytorch_adapter|pytorch_model_head)\.(safetensors|bin)"
)
"""Weights of an adapter and its head; AdapterHub's .bin are read as tensors alone, so that they can run nothing."""


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a repository holds an adapter over another model, and no model."""
    names = set(names)
    whole = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")
    return "adapter_config.json" in names and not any(whole.fullmatch(name) for name in names)


def model_files(names: Iterable[str], allow_pickle: bool = False, code: bool = False) -> list[str]:
    """The files of a model that training reads: configuration, tokenizer, one set of weights; code only when asked."""
    names = list(names)
    weights = weight_files(names, allow_pickle)
    small = {name for name in names if "/" not in name and not name.startswith(".")}
    small = {name for name in small if Path(name).suffix.lower() not in NOT_NEEDED and "index.json" not in name}
    if is_adapter(names):
        weights = [name for name in names if ADAPTER_WEIGHTS.fullmatch(name)]
    scripts = {name for name in names if code and name.endswith(".py")}
    return sorted({*small, *weights, *scripts})


def data_files(names: Iterable[str]) -> list[str]:
    """The files of a data set that hold data or describe it, never a program."""
    described = {"README.md", "dataset_infos.json"}
    return sorted(name for name in names if name in described or Path(name).suffix.lower() in DATA_SUFFIXES)


def missing_parts(names: Iterable[str], repo_type: str, allow_pickle: bool = False) -> list[str]:
    """What a snapshot with these files lacks to be used, in words."""
    names = list(names)
    if repo_type == "dataset":
        return [] if set(data_files(names)) - {"README.md", "dataset_infos.json"} else ["data files"]
    if is_adapter(names):
        return [] if any(ADAPTER_WEIGHTS.fullmatch(name) for name in names) else ["weights of the adapter"]
    missing = [] if "config.json" in names else ["config.json"]
    missing += [] if weight_files(names, allow_pickle) else ["weights (model.safetensors)"]
    return missing + ([] if TOKENIZER_FILES & set(names) else ["a tokenizer (tokenizer.json or vocabulary)"])
