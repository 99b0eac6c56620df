"""Texts become token ids, cached on disk for later runs and other processes; long texts are cut or read in windows."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
import transformers
from datasets import Dataset
from datasets.fingerprint import Hasher

from lib.config.sections import DataConfig
from lib.data.encoding import ENCODING, Encoder, Windows
from lib.errors import UserError
from lib.hub.endpoint import datasets_cache

WINDOWS_KEY = "windows"
"""The key in tokenizer_config.json under which a trained model's windows are saved."""


def tokenize(
    dataset: Dataset, tokenizer: Any, text_columns: Sequence[str], config: DataConfig, windows: Windows | None
) -> Dataset:
    """Unpadded token ids, truncated to max_length or split into windows, from the cache where they are.

    Columns: input_ids, token_type_ids if the tokenizer makes them, labels, length (tokens of the text), truncated (whether
    it is too long), and num_windows with windows. Raises UserError when max_length leaves no room for text.
    """
    limit = min(config.max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=len(text_columns) == 2)
    if limit < special + len(text_columns):
        raise UserError(f"--max_length {config.max_length} leaves no room for text besides {special} special tokens")

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return encoder([rows[column] for column in text_columns]) | {"labels": rows["labels"]}

    key = tokens_key(dataset, tokenizer, text_columns, limit, windows)
    encoder = Encoder(tokenizer, limit, windows)
    cache = datasets_cache() / "tokens" / f"{key}.arrow"
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        usable = cache.is_file() or os.access(cache.parent, os.W_OK)
    except OSError:
        usable = False
    return dataset.map(
        encode,
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=config.preprocessing_num_workers,
        desc="tokenize",
        new_fingerprint=key,
        cache_file_name=str(cache) if usable else None,
    )


def tokens_key(
    dataset: Dataset, tokenizer: Any, text_columns: Sequence[str], limit: int, windows: Windows | None
) -> str:
    """Hash of everything that token ids depend on, the same in every process and run.

    The cache of `datasets` itself does not do: it forgets data that come from memory, and tokenizing a split changes the
    hash of the tokenizer.
    """
    digest = hashlib.sha256(
        f"{ENCODING} {limit} {windows} {tokenizers.__version__} {transformers.__version__}".encode()
    )
    digest.update(f"{type(tokenizer)} {tokenizer.model_input_names} {dataset.features}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        digest.update(Hasher.hash(tokenizer).encode())
    else:
        backend.no_truncation()  # left by the previous call; every call sets its own
        backend.no_padding()
        digest.update(backend.to_str().encode())
    for rows in dataset.select_columns([*text_columns, "labels"]).iter(batch_size=10_000):
        digest.update(repr(rows).encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def truncation_notes(
    tokens: dict[str, Dataset], limit: int, config: DataConfig, windows: Windows | None
) -> tuple[str, ...]:
    """Which share of each split's texts is too long, and whether they are truncated or read in windows."""
    notes = []
    if limit < config.max_length:
        notes.append(f"--max_length {config.max_length} is more than the model can take: {limit} is used")
    for split, dataset in tokens.items():
        share = float(np.mean(dataset["truncated"][:]))
        if windows:
            counts = np.asarray(dataset["num_windows"][:])
            notes.append(
                f"{share:.1%} of the {split} texts are longer than {windows.max_length} tokens and are read in windows that "
                f"share {windows.stride}: {counts.mean():.1f} a text, {counts.max()} at most"
            )
        elif share:
            notes.append(f"{share:.1%} of the {split} texts are longer than {limit} tokens and were cut (--max_length)")
    return tuple(notes)


def choose_windows(
    tokenizer: Any, max_length: int, stride: int | None, num_columns: int, trained: bool
) -> Windows | None:
    """Windows with the stride of --window_stride, or else of a `trained` model's training; None: texts are truncated.

    Writes them into the tokenizer, so that they are saved with it and used by whoever loads it.
    Raises UserError when texts cannot be read in these windows.
    """
    windows = stored_windows(tokenizer) if trained else None
    stride = windows.stride if windows and stride is None else stride
    windows = None if stride is None else Windows(max_length, stride)
    if windows is None:
        tokenizer.init_kwargs.pop(WINDOWS_KEY, None)
    else:
        check_windows(tokenizer, windows, num_columns)
        tokenizer.init_kwargs[WINDOWS_KEY] = dataclasses.asdict(windows)
    return windows


def stored_windows(tokenizer: Any) -> Windows | None:
    """The windows that a tokenizer's model was trained with; None: it truncates long texts."""
    stored = tokenizer.init_kwargs.get(WINDOWS_KEY)
    return Windows(**stored) if stored else None


def check_windows(tokenizer: Any, windows: Windows, num_columns: int) -> None:
    """Raise UserError for pairs of texts, a slow tokenizer, and a stride that leaves no room for new tokens."""
    flag = f"--window_stride {windows.stride}"
    if num_columns != 1:
        raise UserError(f"{flag} is for one text column, not for pairs")
    if not tokenizer.is_fast:
        raise UserError(f"{flag}: {type(tokenizer).__name__} cannot cut text into windows; it needs a fast tokenizer")
    room = windows.max_length - tokenizer.num_special_tokens_to_add()
    if windows.stride >= room:
        raise UserError(f"{flag}: windows of {room} tokens of text cannot share as many; see also --max_length")
