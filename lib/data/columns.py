"""Which splits and columns of a stored data set are meant: named, known, or guessed where that is obvious."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Value

from lib.config.sections import DataConfig
from lib.data.catalog import catalog_source, dataset_name, known_columns
from lib.errors import UserError

TEXT_GUESSES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
    ("review",),
    ("content",),
)
LABEL_GUESSES = ("label", "labels", "target", "class", "category", "sentiment", "stars", "rating", "score")


def find_columns(
    raw: dict[str, Dataset], config: DataConfig, notes: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Text columns and label columns: those named, those of the catalog, else guessed."""
    known_texts, known_label = known_columns(config)
    texts = config.text_columns or known_texts or guess_text_columns(raw, config, notes)
    return texts, config.label_columns or (config.label_column or known_label or guess_label_column(raw, notes),)


def select_splits(
    raw: dict[str, Dataset],
    config: DataConfig,
    wanted: Sequence[str],
    text_columns: Sequence[str],
    label_columns: Sequence[str],
) -> dict[str, Dataset]:
    """The splits by the roles they play. Raises UserError for what `choose_splits` and `check_columns` refuse."""
    chosen = {role: raw[source] for role, source in choose_splits(raw, config, wanted).items()}
    for split, dataset in chosen.items():
        check_columns(dataset, split, text_columns, label_columns)
    return chosen


def choose_splits(raw: dict[str, Dataset], config: DataConfig, wanted: Sequence[str]) -> dict[str, str]:
    """Which stored split plays which role: {role: stored name}; raises UserError when one that must be there is not."""
    source = catalog_source(config)
    aliases = {"validation": ("validation", source.validation if source else "validation", "dev", "valid", "val")}
    chosen = {}
    for role in wanted:
        found = next((name for name in aliases.get(role, (role,)) if name in raw), None)
        if found is not None:
            chosen[role] = found
        elif role == "validation" and "train" in raw:
            chosen["train"] = "train"  # from which a validation split is made
        elif role == "train" or len(wanted) == 1:
            raise UserError(f"there is no {role} split; {dataset_name(config)} has: {', '.join(raw)}")
    return chosen


def guess_text_columns(raw: dict[str, Dataset], config: DataConfig, notes: list[str]) -> tuple[str, ...]:
    """Usual names, else the only text column; raises UserError when there are several."""
    features = next(iter(raw.values())).features
    for guess in TEXT_GUESSES:
        if all(column in features for column in guess):
            break
    else:
        strings = tuple(name for name, feature in features.items() if is_text(feature) and name not in LABEL_GUESSES)
        strings = tuple(name for name in strings if name not in (config.label_column, "label_text", "id", "idx"))
        if len(strings) != 1:
            raise UserError(
                f"which column holds the text? The columns are {', '.join(features)}; name it with --text_columns"
            )
        guess = strings
    notes.append(f"text columns: {' '.join(guess)} (guessed; set --text_columns to change)")
    return guess


def guess_label_column(raw: dict[str, Dataset], notes: list[str]) -> str:
    features = next(iter(raw.values())).features
    for guess in LABEL_GUESSES:
        if guess in features:
            if guess not in ("label", "labels"):
                notes.append(f"label column: {guess} (guessed; set --label_column to change)")
            return guess
    raise UserError(f"which column holds the label? The columns are {', '.join(features)}; name it with --label_column")


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def check_columns(dataset: Dataset, split: str, text_columns: Sequence[str], label_columns: Sequence[str]) -> None:
    """Raise UserError when the split is empty, lacks a column, or has text that is not text."""
    have = ", ".join(dataset.features)
    if not len(dataset):
        raise UserError(f"the {split} split is empty")
    label_flag = "--label_columns" if len(label_columns) > 1 else "--label_column"
    for flag, columns in (("--text_columns", text_columns), (label_flag, label_columns)):
        for column in columns:
            if column not in dataset.features:
                raise UserError(f"{flag} {column}: the {split} split has no such column; it has: {have}")
    for column in text_columns:
        if not is_text(dataset.features[column]):
            kind = getattr(dataset.features[column], "dtype", dataset.features[column])
            raise UserError(
                f"--text_columns {column}: not text but {kind} in the {split} split; name a text column of: {have}"
            )
        texts = dataset.select_columns([column]).with_format("arrow")[:][column]
        missing = np.flatnonzero(texts.is_null())
        if len(missing):
            raise UserError(
                f"{len(missing)} rows of the {split} split have no {column}, the first is row {missing[0] + 1}"
            )
