"""Which files of a repository a run reads, and which it lacks: decided by their names."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
NOT_NEEDED = {
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".pkl", ".gguf", ".npz", ".npy"),
    *(".safetensors", ".py", ".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".zip", ".gz", ".tar", ".parquet"),
}
"""Suffixes of a model's files that are neither configuration nor tokenizer."""
DATA_SUFFIXES = {
    *(".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".txt", ".xml"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"),
}
DATA_CARDS = {"README.md", "dataset_infos.json"}
"""Files that describe a data set, and hold no data."""
TOKENIZER_FILES = {
    *("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("spm.model", "bpe.codes", "tokenizer_config.json"),
}
OPTIONAL_FILES = (
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("adapter_config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("model.safetensors.index.json", "tokenizer_config.json", "tokenizer.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
"""Files that transformers asks for and that many models do not have."""
ADAPTER_WEIGHTS = re.compile(
    r"adapter_model\.safetensors|(adapter|model_head|pytorch_adapter|pytorch_model_head)\.(safetensors|bin)"
)
"""Weights of an adapter and its head. AdapterHub's .bin files are loaded with `weights_only`, so they can run no code."""


def weight_files(names: Iterable[str], allow_pickle: bool) -> list[str]:
    """The weights of a model that are loaded, with their index: safetensors, else pickled .bin files where allowed."""
    top = [name for name in names if "/" not in name]
    safe = [name for name in top if re.fullmatch(r"(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors", name)]
    if safe:
        return sorted({*safe, *(name for name in top if name == "model.safetensors.index.json")})
    pickled = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?")
    return sorted(name for name in top if pickled.fullmatch(name)) if allow_pickle else []


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a repository holds an adapter for another model, and no model."""
    names = set(names)
    whole = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")
    return "adapter_config.json" in names and not any(whole.fullmatch(name) for name in names)


def model_files(names: Iterable[str], allow_pickle: bool = False, code: bool = False) -> list[str]:
    """The files of a model that a run reads: configuration, tokenizer, one set of weights; code only when asked for."""
    names = list(names)
    weights = weight_files(names, allow_pickle)
    small = {name for name in names if "/" not in name and not name.startswith(".")}
    small = {name for name in small if Path(name).suffix.lower() not in NOT_NEEDED and "index.json" not in name}
    if is_adapter(names):
        weights = [name for name in names if ADAPTER_WEIGHTS.fullmatch(name)]
    scripts = {name for name in names if code and name.endswith(".py")}
    return sorted({*small, *weights, *scripts})


def data_files(names: Iterable[str]) -> list[str]:
    """The files of a data set that hold data or describe it, never code."""
    return sorted(name for name in names if name in DATA_CARDS or Path(name).suffix.lower() in DATA_SUFFIXES)


def missing_parts(names: Iterable[str], repo_type: str, allow_pickle: bool = False) -> list[str]:
    """What a repository with these files lacks to be used, in words."""
    names = list(names)
    if repo_type == "dataset":
        return [] if set(data_files(names)) - DATA_CARDS else ["data files"]
    if is_adapter(names):
        return [] if any(ADAPTER_WEIGHTS.fullmatch(name) for name in names) else ["weights of the adapter"]
    missing = [] if "config.json" in names else ["config.json"]
    missing += [] if weight_files(names, allow_pickle) else ["weights (model.safetensors)"]
    return missing + ([] if TOKENIZER_FILES & set(names) else ["a tokenizer (tokenizer.json or vocabulary)"])


def missing_shards(files: Mapping[str, Path]) -> list[str]:
    """Shards that an index, or the numbers in the names of other shards, promise and that are not among `files`."""
    promised: set[str] = set()
    for name, path in files.items():
        if name.endswith((".safetensors.index.json", ".bin.index.json")):
            try:
                shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
                folder = name.rpartition("/")[0]
                promised |= {f"{folder}/{shard}" if folder else str(shard) for shard in shards}
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                continue  # its damage is found by `file_damage`
        if match := SHARD.fullmatch(name):
            stem, _, count, suffix = match.groups()
            if suffix in (".safetensors", ".bin", ".parquet"):
                first = 0 if suffix == ".parquet" else 1  # data sets count from 0, weights from 1
                promised |= {f"{stem}-{first + index:05}-of-{count}{suffix}" for index in range(int(count))}
    return sorted(promised - set(files))
