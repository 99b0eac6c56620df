"""Texts become token ids; long texts are cut or read in windows."""

import dataclasses
import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset

from lib.config.sections import DataConfig
from lib.data.encoding import Encoder, Windows
from lib.errors import UserError
from lib.runtime.signals import end_as_worker

WINDOWS_KEY = "windows"
"""The key in tokenizer_config.json under which a trained model's windows are saved."""

ENCODER: Any = None
"""In a worker process: what it encodes with."""

T = TypeVar("T")


def tokenize(
    texts: Iterator[list[list[str]]], tokenizer: Any, limit: int, windows: Windows | None, workers: int | None = None
) -> Iterator[pa.Table]:
    """Unpadded token ids of each chunk of texts (a list for each text column), truncated to `limit` or in windows.

    Columns: input_ids, token_type_ids if the tokenizer makes them, length (tokens of the text), truncated (whether it is
    too long), and num_windows with windows. A fast tokenizer uses all cores; the work of another one is shared by
    `workers` processes. Memory holds a few chunks.
    """
    encoder = Encoder(tokenizer, limit, windows)
    if tokenizer.is_fast:  # a thread encodes the next chunk while this one is converted
        with ThreadPoolExecutor(1) as pool:
            yield from map(tabulate, ahead(pool, encoder, texts, 1))
    elif workers and workers > 1:  # forked processes get the tokenizer as it is
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), set_encoder, (encoder,)) as pool:
            yield from map(tabulate, ahead(pool, encode_in_worker, texts, 2 * workers))
    else:
        yield from map(tabulate, map(encoder, texts))


def ahead(pool: Executor, function: Callable[[Any], T], items: Iterable[Any], depth: int) -> Iterator[T]:
    """`function` of each item, in order; `pool` is at most `depth` items ahead of the one that is waited for."""
    pending: deque[Future[T]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def set_encoder(encoder: Encoder) -> None:
    """Give a worker process what it encodes with; it ends with the process that started it."""
    global ENCODER
    ENCODER = encoder
    end_as_worker()


def encode_in_worker(texts: list[list[str]]) -> dict[str, list[Any]]:
    encoded: dict[str, list[Any]] = ENCODER(texts)
    return encoded


def tabulate(encoded: dict[str, list[Any]]) -> pa.Table:
    """The columns of an Encoder as an Arrow table."""
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
    """The windows that a tokenizer's model was trained with; None: it truncates long texts. Raises UserError if damaged."""
    stored = tokenizer.init_kwargs.get(WINDOWS_KEY)
    if not stored:
        return None
    try:
        windows = Windows(int(stored["max_length"]), int(stored["stride"]))
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f"tokenizer_config.json of {tokenizer.name_or_path}: {WINDOWS_KEY} is {stored!r}, not max_length and stride; "
            "correct or remove it"
        ) from None
    return windows


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
