"""What a model was trained on, kept in its config.json, so that whoever uses the model reads text as its training did.

The order of the labels, the problem type and the thresholds stand beside it in config.json, where transformers has the
first two; windows stand in tokenizer_config.json.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.config.sections import DataConfig
from lib.data.tokenization import stored_windows
from lib.errors import UserError

KEY = "trained_on"
"""The key in config.json."""

NO_LIMIT = 10**9
"""A tokenizer that knows no limit has a larger number."""

KINDS = {1: "one text", 2: "pairs of texts"}

DEFAULT_LENGTH = 128
"""Tokens that are read of a text where neither options nor the model set a limit."""


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """The data of a model's training and how it was read; empty and None where that is not known."""

    dataset: str | None = None
    text_columns: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()
    max_length: int | None = None
    """Most tokens of a text, or of a window of one."""
    metrics: tuple[str, ...] = ()
    pad_to_max_length: bool = False
    soft_labels: tuple[str, ...] = ()
    """Columns of probabilities, as --soft_labels; `label_columns` are those of splits without them."""


UNKNOWN = TrainedOn()
"""Of a model that was trained elsewhere, or not yet."""


def store_trained_on(config: Any, trained_on: TrainedOn) -> None:
    """Put the record into a model's configuration, which is saved with the model."""
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(trained_on).items()}
    if not trained_on.soft_labels:
        del plain["soft_labels"]
    setattr(config, KEY, plain)


def read_trained_on(file: Path, key: str | None = KEY) -> TrainedOn:
    """The record under `key` in a config.json, or a file that has its fields; UNKNOWN where there is none."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        stored = stored if key is None else stored[key]
        dataset, length = stored["dataset"], stored["max_length"]
        lists = [stored[name] for name in ("text_columns", "label_columns", "metrics")]
        lists.append(stored.get("soft_labels", []))  # not known to earlier versions
        padded = stored["pad_to_max_length"] is True
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return UNKNOWN
    known = isinstance(dataset, str) and type(length) is int and length > 0
    known = known and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
    texts, labels, metrics, soft = map(tuple, lists) if known else ((), (), (), ())
    return TrainedOn(dataset, texts, labels, length, metrics, padded, soft) if len(texts) in (1, 2) else UNKNOWN


def input_length(asked: int | None, trained_on: TrainedOn, tokenizer: Any) -> int:
    """Most tokens to read of a text: `asked` (--max_length), else as in the model's training, else all that it can take."""
    windows = stored_windows(tokenizer)
    chosen = asked or trained_on.max_length or (windows.max_length if windows else None)
    if chosen is None:
        return tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else DEFAULT_LENGTH
    return min(chosen, tokenizer.model_max_length)


def as_in_training(config: DataConfig, trained_on: TrainedOn, tokenizer: Any) -> DataConfig:
    """The options with the length and the padding of the model's training where they name none."""
    length = input_length(config.max_length, trained_on, tokenizer)
    padded = config.pad_to_max_length or trained_on.pad_to_max_length
    return dataclasses.replace(config, max_length=length, pad_to_max_length=padded)


def columns_note(used: Sequence[str], trained_on: TrainedOn, given: bool, where: str) -> str | None:
    """A sentence where the text columns that are `used` are not those of the model's training; None where they are.

    `given` are columns that the user named. Raises UserError where one text would take the place of a pair, or a pair
    that of one text, unless the user named them.
    """
    before = trained_on.text_columns
    if not before or tuple(used) == before:
        return None
    trained = f"the model was trained on {KINDS[len(before)]} ({' '.join(before)})"
    if len(used) == len(before):
        why = "--text_columns" if given else f"{where} does not have the former; set --text_columns to change"
        return f"warning: {trained}, and reads {' '.join(used)} now ({why})"
    if not given:
        found = f"{KINDS[len(used)]} ({' '.join(used)}) in {where}"
        raise UserError(f"{trained}, and would read {found}; name what it should read with --text_columns")
    return f"warning: {trained}, and reads {KINDS[len(used)]} now ({' '.join(used)})"
