"""Token ids are kept on the disk, for later runs and the other processes."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import tokenizers
import transformers
from datasets import Dataset
from datasets.fingerprint import Hasher

from lib.data.windows import Windows
from lib.hub.endpoint import datasets_cache


def tokens_key(
    dataset: Dataset, tokenizer: Any, text_columns: Sequence[str], limit: int, windows: Windows | None
) -> str:
    """Hash of all that token ids depend on, the same in every process and every run.

    `datasets` keeps no tables of data that it did not read from files, and hashes the tokenizer anew for each split.
    """
    digest = hashlib.sha256(f"{limit} {windows} {tokenizers.__version__} {transformers.__version__}".encode())
    digest.update(f"{type(tokenizer)} {tokenizer.model_input_names} {dataset.features}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        digest.update(Hasher.hash(tokenizer).encode())
    else:
        backend.no_truncation()  # what the call before has left there; each call sets its own
        backend.no_padding()
        digest.update(backend.to_str().encode())
    for rows in dataset.select_columns([*text_columns, "labels"]).iter(batch_size=10_000):
        digest.update(repr(rows).encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def cache_file(key: str) -> str | None:
    """Where token ids are kept for later runs; None where nothing can be written."""
    path = datasets_cache() / "tokens" / f"{key}.arrow"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(path) if path.is_file() or os.access(path.parent, os.W_OK) else None
