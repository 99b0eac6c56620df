"""Token ids are kept on the disk, for later runs and the other processes."""

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
from lib.errors import UserError
from lib.hub.endpoint import datasets_cache

KEY = "windows"
"""Where tokenizer_config.json says how the model was trained to read long texts."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of at most `max_length` tokens, special tokens included, of which neighbours share `stride`."""

    max_length: int
    stride: int


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


def tokenize(
    dataset: Dataset, tokenizer: Any, text_columns: Sequence[str], config: DataConfig, windows: Windows | None
) -> Dataset:
    """Token ids, cut to max_length or into windows and not padded; padding belongs to the batch."""
    limit = min(config.max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=len(text_columns) == 2)
    if limit < special + len(text_columns):
        raise UserError(f"--max_length {config.max_length} leaves no room for text beside {special} special tokens")

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # Empty texts stay: they still get special tokens, and dropping them would shift the order of predictions.
        texts = [list(rows[column]) for column in text_columns]
        if windows:
            split = encode_windows(tokenizer, texts[0], windows)
            sizes = [sum(map(len, pieces)) for pieces in split["input_ids"]]
            long = [count > 1 for count in split["num_windows"]]
            return split | {"labels": rows["labels"], "length": sizes, "truncated": long}
        batch = tokenizer(*texts, truncation=True, max_length=limit)
        ids = batch["input_ids"]
        cut = [bool(e.overflowing) for e in batch.encodings] if batch.encodings else [len(i) >= limit for i in ids]
        encoded = {"input_ids": ids, "labels": rows["labels"], "length": [len(i) for i in ids], "truncated": cut}
        if "token_type_ids" in batch:
            encoded["token_type_ids"] = batch["token_type_ids"]
        return encoded

    key = tokens_key(dataset, tokenizer, text_columns, limit, windows)
    return dataset.map(
        encode,
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=config.preprocessing_num_workers,
        desc="tokenize",
        new_fingerprint=key,
        cache_file_name=cache_file(key),
    )


def report_truncation(
    tokens: dict[str, Dataset], limit: int, config: DataConfig, windows: Windows | None, notes: list[str]
) -> None:
    """Note the share of long texts, and what becomes of them."""
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


def stored_windows(tokenizer: Any) -> Windows | None:
    """How the model of this tokenizer was trained to read long texts; None: it cuts them."""
    stored = tokenizer.init_kwargs.get(KEY)
    return Windows(**stored) if stored else None


def store_windows(tokenizer: Any, windows: Windows | None) -> None:
    """Let the tokenizer be saved with `windows`, so that whoever uses the model reads long texts as it was trained to."""
    tokenizer.init_kwargs.pop(KEY, None)
    if windows is not None:
        tokenizer.init_kwargs[KEY] = dataclasses.asdict(windows)


def choose_windows(
    tokenizer: Any, max_length: int, stride: int | None, num_columns: int, trained: bool
) -> Windows | None:
    """The windows asked for, else, if the model is `trained`, those it was trained with; noted in the tokenizer.

    None: long texts are cut. Raises UserError when texts cannot be read in windows.
    """
    windows = stored_windows(tokenizer) if trained else None
    if stride is not None:
        windows = Windows(max_length, stride)
    if windows is not None:
        check_windows(tokenizer, windows, num_columns)
    store_windows(tokenizer, windows)
    return windows


def check_windows(tokenizer: Any, windows: Windows, num_columns: int) -> None:
    """Raise UserError when texts cannot be read in these windows."""
    flag = f"--window_stride {windows.stride}"
    if num_columns != 1:
        raise UserError(f"{flag} is for one text column, not for pairs")
    if not tokenizer.is_fast:
        raise UserError(f"{flag}: {type(tokenizer).__name__} cannot cut text into windows; it needs a fast tokenizer")
    room = windows.max_length - tokenizer.num_special_tokens_to_add()
    if windows.stride >= room:
        raise UserError(f"{flag}: windows of {room} tokens of text cannot share as many; see also --max_length")


def encode_windows(tokenizer: Any, texts: list[str], windows: Windows) -> dict[str, list[Any]]:
    """Each input of the model (but the mask) as a list of windows for each text, and `num_windows`.

    All windows of a text but the last are full. A text that is not too long is one window, the same tokens as without.
    """
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=windows.max_length,
        stride=windows.stride,
        return_overflowing_tokens=True,
    )
    counts = np.bincount(encoded["overflow_to_sample_mapping"], minlength=len(texts))
    ends = np.cumsum(counts)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    grouped = {name: [encoded[name][end - n : end] for end, n in zip(ends, counts, strict=True)] for name in names}
    return grouped | {"num_windows": counts.tolist()}
