"""The cache of frozen outputs on disk: keyed by model and data, published atomically, limited in size.

HF_DATASETS_CACHE/features/KEY/    manifest.json  features.safetensors
"""

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lib.errors import first_line
from lib.hub.endpoint import datasets_cache
from lib.runtime.atomic import MANIFEST, drafting, find_damage, publish_folder, remove_unused, write_manifest

NAMES_ONLY = ("id2label", "label2id", "problem_type", "_name_or_path", "transformers_version")
"""Settings of a model that do not change what its frozen part computes."""


def cache_folder() -> Path:
    """The folder of the cache, beside the tables of `datasets`; HF_DATASETS_CACHE moves both."""
    return datasets_cache() / "features"


def model_digest(model: Any, *facts: Any) -> str:
    """sha256 of everything but the data that the frozen output depends on.

    These are weights, configuration, class, versions of the libraries, remote code, and `facts`.
    """
    settings = {key: value for key, value in model.config.to_dict().items() if key not in NAMES_ONLY}
    settings["attn_implementation"] = model.config._attn_implementation  # to_dict leaves it out
    program = [type(model).__module__, type(model).__qualname__, torch.__version__, transformers.__version__]
    program += [inspect.getsource(module) for module in remote_modules(model)]
    digest = hashlib.sha256(json.dumps([settings, program, facts], sort_keys=True, default=str).encode())
    for name, tensor in frozen_tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def remote_modules(model: nn.Module) -> list[ModuleType]:
    """The Python modules of a model's classes that came with the model: their names do not tell what is in them."""
    names = {type(part).__module__ for part in model.modules()}
    return [sys.modules[name] for name in sorted(names) if name.startswith("transformers_modules.")]


def frozen_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    state = model.state_dict(keep_vars=True)
    return sorted((name, tensor) for name, tensor in state.items() if not tensor.requires_grad)


def data_digest(tokens: Dataset) -> str:
    """sha256 of what the model reads of a split, in order: token ids, and token types if there are any."""
    digest = hashlib.sha256(str(len(tokens)).encode())
    columns = [name for name in sorted(tokens.column_names) if name not in ("labels", "rows")]
    for batch in tokens.with_format("arrow").iter(batch_size=10_000):
        for name in columns:
            values = batch[name].combine_chunks()
            digest.update(name.encode())
            digest.update(values.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(values.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def load_features(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
    """What `save_features` wrote; None if it cannot be read or has another shape or dtype."""
    try:
        features = load_file(folder / "features.safetensors")["features"]
        os.utime(folder / MANIFEST)  # used now: others go first
    except (OSError, SafetensorError, KeyError):
        return None
    return features if tuple(features.shape) == tuple(shape) and features.dtype == dtype else None


def check_features(folder: Path) -> str | None:
    """None if the features in `folder` are valid, `absent` if there are none, else the damage in words."""
    return find_damage(folder) if folder.exists() else "absent"


def save_features(folder: Path, features: torch.Tensor, record: dict[str, Any], limit: float) -> str | None:
    """Publish features, then delete the least recently used ones beyond `limit` bytes; returns None, or why it failed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with drafting(folder) as fresh:
            save_file({"features": features.cpu().contiguous()}, fresh / "features.safetensors")
            write_manifest(fresh, record)
            publish_folder(fresh, folder)
        remove_unused(folder.parent, limit)
    except (OSError, SafetensorError) as error:
        return first_line(error)
    return None
