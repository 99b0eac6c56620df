"""How texts become token ids, in one way for training, evaluation and prediction."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PaddingStrategy, PreTrainedTokenizerBase, TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend


@dataclasses.dataclass(frozen=True)
class Windows:
    """Overlapping windows of at most `max_length` tokens, special tokens included; neighbors share `stride` tokens."""

    max_length: int
    stride: int


class Encoder:
    """Turns texts, or pairs of texts, into token ids without padding, cut to `limit` tokens or split into windows.

    A special token that a text spells out, such as </s>, is text: it may neither end nor hide anything. A text without
    any token gets one where the tokenizer adds none, since models take no empty input.
    """

    def __init__(self, tokenizer: Any, limit: int, windows: Windows | None = None) -> None:
        self.tokenizer, self.limit, self.windows = tokenizer, limit, windows

    @functools.cached_property
    def reachable(self) -> list[str]:
        return reachable_tokens(self.tokenizer)

    def __call__(self, columns: Sequence[Sequence[str]]) -> dict[str, list[Any]]:
        """Lists by column, an item for each text of `columns`, which are one, or two of the same length for pairs.

        `input_ids`, `token_type_ids` if the tokenizer makes them, `length` (tokens of the text), `truncated` (whether it is
        too long); with windows a list of windows for each text, and `num_windows`.
        """
        texts = [list(column) for column in columns]
        encoded = self.encode(texts)
        rows = self.misread(encoded["input_ids"], pairs=len(texts) == 2) if self.reachable else []
        if rows:
            again = self.encode([[self.plain(column[row]) for row in rows] for column in texts])
            for name, values in again.items():
                for row, value in zip(rows, values, strict=True):
                    encoded[name][row] = value
        return encoded

    def encode(self, texts: list[list[str]]) -> dict[str, list[Any]]:
        """As `__call__`; special tokens in a text are text as far as the tokenizer itself can see to it."""
        encoded: dict[str, list[Any]]
        if has_plain_call(self.tokenizer):
            encoded = call_backend(self.tokenizer, self.limit, self.windows, texts)
        elif self.windows:
            encoded = encode_windows(self.tokenizer, texts[0], self.windows)
        else:
            batch = self.tokenizer(*texts, truncation=True, max_length=self.limit)
            encoded = {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}
            cut = [bool(e.overflowing) for e in batch.encodings] if batch.encodings else None
            encoded["truncated"] = cut or [len(ids) >= self.limit for ids in batch["input_ids"]]
        ids, types = encoded["input_ids"], encoded.get("token_type_ids", [])
        if self.windows:
            fill_empty(self.tokenizer, list(itertools.chain(*ids)), list(itertools.chain(*types)))
            truncated = [count > 1 for count in encoded["num_windows"]]
            return encoded | {"length": [sum(map(len, pieces)) for pieces in ids], "truncated": truncated}
        fill_empty(self.tokenizer, ids, types)
        return encoded | {"length": list(map(len, ids))}

    def misread(self, input_ids: list[Any], pairs: bool) -> list[int]:
        """The rows that have more special tokens than the tokenizer puts around a text."""
        added = self.tokenizer.num_special_tokens_to_add(pair=pairs)
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        rows = []
        for row, ids in enumerate(input_ids):
            windows = ids if self.windows else [ids]
            if any(sum(token in special for token in window) > added for window in windows):
                rows.append(row)
        return rows

    def plain(self, text: str) -> str:
        """`text` with a space behind the first character of each special token, which then is none."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer if self.tokenizer.is_fast else None
        if normalizer is not None and not any(token in text for token in self.reachable):
            text = normalizer.normalize_str(text)  # which made a special token of other characters
        for token in self.reachable:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def has_plain_call(tokenizer: Any) -> bool:
    """Whether the tokenizer's own call adds nothing to that of its backend."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and kind._encode_plus is TokenizersBackend._encode_plus
        and kind.__call__ is PreTrainedTokenizerBase.__call__
    )


def call_backend(tokenizer: Any, limit: int, windows: Windows | None, texts: list[list[str]]) -> dict[str, list[Any]]:
    """What the tokenizer's call returns, a third faster: without offsets and masks, which nobody reads.

    A backend encodes a batch on all cores.
    """
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


def model_inputs(encoded: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """What a model reads, as a collator takes it: an item for each text, or for each window where texts are in windows."""
    columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
    if "num_windows" in encoded:
        columns = {name: list(itertools.chain(*windows)) for name, windows in columns.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def reachable_tokens(tokenizer: Any) -> list[str]:
    """The special tokens that a text can still become, the longest first; none with most tokenizers.

    `split_special_tokens` stops a fast tokenizer from looking for them, but a vocabulary of pieces that holds them
    (SentencePiece's unigrams: T5, XLNet, XLM-R) finds them itself. A word that somebody made the padding token is a word.
    """
    tokens = [t for t in tokenizer.all_special_tokens if len(t) > 1 and not t.isalnum() and t != tokenizer.unk_token]
    found = []
    for token in tokens:
        tries = tokenizer([token, f"a {token} a", f"a{token}a"], add_special_tokens=False)["input_ids"]
        if any(tokenizer.convert_tokens_to_ids(token) in ids for ids in tries):
            found.append(token)
    return sorted(found, key=len, reverse=True)


def fill_empty(tokenizer: Any, rows: list[list[int]], types: list[list[int]]) -> None:
    """Give each empty list in `rows` one token, in place, and its place in `types` a 0 where there are types."""
    for number, ids in enumerate(rows):
        if not ids:
            known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
            ids.append(next(token for token in known if token is not None))
            if types and not types[number]:
                types[number].append(0)


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
