"""Texts become token ids; long texts are cut or read in windows."""

import dataclasses
import functools
import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers.tokenization_utils_base import PaddingStrategy, PreTrainedTokenizerBase, TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from lib.config.sections import DataConfig
from lib.errors import UserError

WINDOWS_KEY = "windows"
"""The key in tokenizer_config.json under which a trained model's windows are saved."""

ENCODER: Any = None
"""In a worker process: tokenizer, limit and windows."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Windows:
    """Overlapping windows of at most `max_length` tokens, special tokens included; neighbors share `stride` tokens."""

    max_length: int
    stride: int


def tokenize(
    texts: Iterator[list[list[str]]], tokenizer: Any, limit: int, windows: Windows | None, workers: int | None = None
) -> Iterator[pa.Table]:
    """Unpadded token ids of each chunk of texts (a list for each text column), truncated to `limit` or in windows.

    Columns: input_ids, token_type_ids if the tokenizer makes them, length (tokens of the text), truncated (whether it is
    too long), and num_windows with windows. A fast tokenizer uses all cores; the work of another one is shared by
    `workers` processes. Memory holds a few chunks.
    """
    if tokenizer.is_fast:  # a thread encodes the next chunk while this one is converted
        with ThreadPoolExecutor(1) as pool:
            yield from map(tabulate, ahead(pool, functools.partial(encode, tokenizer, limit, windows), texts, 1))
    elif workers and workers > 1:  # forked processes get the tokenizer as it is
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), set_encoder, (tokenizer, limit, windows)
        ) as pool:
            yield from map(tabulate, ahead(pool, encode_in_worker, texts, 2 * workers))
    else:
        yield from (tabulate(encode(tokenizer, limit, windows, chunk)) for chunk in texts)


def ahead(pool: Executor, function: Callable[[Any], T], items: Iterable[Any], depth: int) -> Iterator[T]:
    """`function` of each item, in order; `pool` is at most `depth` items ahead of the one that is waited for."""
    pending: deque[Future[T]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def set_encoder(*settings: Any) -> None:
    """Give a worker process the tokenizer, the limit and the windows that it encodes with."""
    global ENCODER
    ENCODER = settings


def encode_in_worker(texts: list[list[str]]) -> dict[str, list[Any]]:
    tokenizer, limit, windows = ENCODER
    return encode(tokenizer, limit, windows, texts)


def encode(tokenizer: Any, limit: int, windows: Windows | None, texts: list[list[str]]) -> dict[str, list[Any]]:
    """The columns of `tokenize` as lists, an item for each text."""
    # Empty texts are kept: they have special tokens, and without them rows and predictions would not match.
    encoded: dict[str, list[Any]]
    if has_plain_call(tokenizer):
        encoded = call_backend(tokenizer, limit, windows, texts)
    elif windows:
        encoded = encode_windows(tokenizer, texts[0], windows)
    else:
        batch = tokenizer(*texts, truncation=True, max_length=limit)
        encoded = {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}
        cut = [bool(e.overflowing) for e in batch.encodings] if batch.encodings else None
        encoded["truncated"] = cut or [len(ids) >= limit for ids in batch["input_ids"]]
    if windows:
        encoded["length"] = [sum(map(len, pieces)) for pieces in encoded["input_ids"]]
        encoded["truncated"] = [count > 1 for count in encoded["num_windows"]]
    else:
        encoded["length"] = list(map(len, encoded["input_ids"]))
    return encoded


def has_plain_call(tokenizer: Any) -> bool:
    """Whether the tokenizer's own call adds nothing to that of its backend."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and kind._encode_plus is TokenizersBackend._encode_plus
        and kind.__call__ is PreTrainedTokenizerBase.__call__
    )


def call_backend(tokenizer: Any, limit: int, windows: Windows | None, texts: list[list[str]]) -> dict[str, list[Any]]:
    """What the tokenizer's call returns, a third faster: without offsets and masks, which nobody reads."""
    longest = TruncationStrategy.LONGEST_FIRST
    limit, stride = (windows.max_length, windows.stride) if windows else (limit, 0)
    tokenizer.set_truncation_and_padding(PaddingStrategy.DO_NOT_PAD, longest, limit, stride, None, None)
    backend = tokenizer.backend_tokenizer
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))
    names = {"input_ids": "ids"}
    if "token_type_ids" in tokenizer.model_input_names:
        names["token_type_ids"] = "type_ids"
    if windows:
        pieces = [[first, *first.overflowing] for first in encodings]
        encoded = {name: [[getattr(p, kind) for p in row] for row in pieces] for name, kind in names.items()}
        return encoded | {"num_windows": list(map(len, pieces))}
    encoded = {name: [getattr(encoding, kind) for encoding in encodings] for name, kind in names.items()}
    rows = zip(encodings, encoded["input_ids"], strict=True)
    return encoded | {"truncated": [len(ids) >= limit and bool(encoding.overflowing) for encoding, ids in rows]}


def tabulate(encoded: dict[str, list[Any]]) -> pa.Table:
    """The columns of `encode` as an Arrow table."""
    kinds = {"input_ids": np.int32, "token_type_ids": np.int8}
    columns = {name: pa.array(values) for name, values in encoded.items() if name not in kinds}
    tokens = {name: nested(encoded[name], kind) for name, kind in kinds.items() if name in encoded}
    return pa.table(tokens | columns)


def nested(lists: list[Any], dtype: Any) -> pa.ListArray:
    """Lists of numbers, or lists of such lists, as an Arrow array; through NumPy, not one Python object at a time."""
    starts, values = np.cumsum([0, *map(len, lists)], dtype=np.int32), itertools.chain.from_iterable(lists)
    if lists and lists[0] and isinstance(lists[0][0], list):
        return pa.ListArray.from_arrays(starts, nested(list(values), dtype))
    return pa.ListArray.from_arrays(starts, np.fromiter(values, dtype, int(starts[-1])))


def token_limit(tokenizer: Any, config: DataConfig, num_columns: int) -> int:
    """The most tokens of a text. Raises UserError when it leaves no room for text."""
    limit = min(config.max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=num_columns == 2)
    if limit < special + num_columns:
        raise UserError(f"--max_length {config.max_length} leaves no room for text besides {special} special tokens")
    return int(limit)


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


def encode_windows(tokenizer: Any, texts: list[str], windows: Windows) -> dict[str, list[Any]]:
    """input_ids and token_type_ids as a list of windows for each text, without padding, and `num_windows`.

    All windows of a text but the last are full. A text that fits is one window, with the same tokens as without windows.
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
