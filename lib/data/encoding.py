"""How texts become token ids, in one way for training, evaluation and prediction."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

ENCODING = 2
"""Part of the cache key of token ids: raised whenever a text gets other ids than before."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Overlapping windows of at most `max_length` tokens, special tokens included; neighbors share `stride` tokens."""

    # The repr is part of the cache key of token ids: a renamed class or field would tokenize all data again.
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
        if self.windows:
            encoded = encode_windows(self.tokenizer, texts[0], self.windows)
            pieces = [ids for windows in encoded["input_ids"] for ids in windows]
            types = [ids for windows in encoded.get("token_type_ids", []) for ids in windows]
            fill_empty(self.tokenizer, pieces, types)
            sizes = [sum(map(len, windows)) for windows in encoded["input_ids"]]
            return encoded | {"length": sizes, "truncated": [count > 1 for count in encoded["num_windows"]]}
        batch = self.tokenizer(*texts, truncation=True, max_length=self.limit)
        ids, types = batch["input_ids"], batch.get("token_type_ids", [])
        fill_empty(self.tokenizer, ids, types)
        cut = [bool(e.overflowing) for e in batch.encodings] if batch.encodings else [len(i) >= self.limit for i in ids]
        encoded = {"input_ids": ids, "length": [len(i) for i in ids], "truncated": cut}
        return encoded | ({"token_type_ids": types} if "token_type_ids" in batch else {})

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
