"""Which splits and columns of a stored data set are used: those named, those of the catalog, or obvious guesses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from lib.config.sections import DataConfig
from lib.data.catalog import catalog_entry, dataset_name
from lib.data.trained_on import TrainedOn, columns_note
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
"""Usual names of text columns, tried in this order."""

LABEL_GUESSES = ("label", "labels", "target", "class", "category", "sentiment", "stars", "rating", "score")
"""Usual names of the label column, tried in this order."""


def find_columns(
    raw: dict[str, Dataset], config: DataConfig, trained_on: TrainedOn
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Text columns, label columns, and notes on what was guessed.

    They are those that the options name, else those of the model's training where the data has them, else those of the
    catalog, else guesses. Raises UserError when there is no obvious guess.
    """
    entry, features, notes = catalog_entry(config), next(iter(raw.values())).features, list[str]()
    known = [columns for columns in (trained_on.text_columns, trained_on.label_columns) if set(columns) <= {*features}]
    texts = config.text_columns or (trained_on.text_columns if trained_on.text_columns in known else ())
    texts = texts or (entry.text_columns if entry else ())
    if not texts:
        texts = guess_text_columns(features, config.label_column)
        notes.append(f"text columns: {' '.join(texts)} (guessed; set --text_columns to change)")
    change = columns_note(texts, trained_on, config.text_columns is not None, dataset_name(config))
    notes += [change] if change else []
    if config.label_columns:
        return texts, config.label_columns, tuple(notes)
    if config.label_column is None and trained_on.label_columns in known and trained_on.label_columns:
        return texts, trained_on.label_columns, tuple(notes)
    label = config.label_column or (entry.label_column if entry else None)
    if label is None:
        label = next((name for name in LABEL_GUESSES if name in features), None)
        if label is None:
            raise UserError(
                f"which column holds the label? The columns are {', '.join(features)}; name it with --label_column"
            )
        if label not in ("label", "labels"):
            notes.append(f"label column: {label} (guessed; set --label_column to change)")
    if config.label_column is None and trained_on.label_columns:
        before = " ".join(trained_on.label_columns)
        notes.append(f"warning: the model was trained on the label {before}, which is not there; {label} is used")
    return texts, (label,), tuple(notes)


def guess_text_columns(features: Features, label_column: str | None) -> tuple[str, ...]:
    """Usual names, or else the only text column. Raises UserError when there are several or none."""
    for guess in TEXT_GUESSES:
        if all(column in features for column in guess):
            return guess
    others = {*LABEL_GUESSES, label_column, "label_text", "id", "idx"}
    texts = tuple(name for name, feature in features.items() if is_text(feature) and name not in others)
    if len(texts) != 1:
        raise UserError(
            f"which column holds the text? The columns are {', '.join(features)}; name it with --text_columns"
        )
    return texts


def choose_splits(raw: dict[str, Dataset], config: DataConfig, wanted: Sequence[str]) -> dict[str, Dataset]:
    """The stored splits by the role they play; train comes along where validation must be held out from it.

    Raises UserError when there is no train split, or not the only split that is wanted.
    """
    entry = catalog_entry(config)
    aliases = {"validation": ("validation", entry.validation if entry else "validation", "dev", "valid", "val")}
    chosen = {}
    for role in wanted:
        found = next((name for name in aliases.get(role, (role,)) if name in raw), None)
        if found is not None:
            chosen[role] = raw[found]
        elif role == "validation" and "train" in raw:
            chosen["train"] = raw["train"]
        elif role == "train" or len(wanted) == 1:
            raise UserError(f"there is no {role} split; {dataset_name(config)} has: {', '.join(raw)}")
    return chosen


def check_columns(splits: dict[str, Dataset], text_columns: Sequence[str], label_columns: Sequence[str]) -> None:
    """Raise UserError for an empty split, a missing column, a text column of another type, and a row without text."""
    label_flag = "--label_columns" if len(label_columns) > 1 else "--label_column"
    for split, dataset in splits.items():
        have = ", ".join(dataset.features)
        if not len(dataset):
            raise UserError(f"the {split} split is empty")
        for flag, columns in (("--text_columns", text_columns), (label_flag, label_columns)):
            for column in columns:
                if column not in dataset.features:
                    raise UserError(f"{flag} {column}: the {split} split has no such column; it has: {have}")
        for column in text_columns:
            feature = dataset.features[column]
            if not is_text(feature):
                kind = getattr(feature, "dtype", feature)
                raise UserError(
                    f"--text_columns {column}: not text but {kind} in the {split} split; name a text column of: {have}"
                )
            missing = np.flatnonzero(dataset.select_columns([column]).with_format("arrow")[:][column].is_null())
            if len(missing):
                raise UserError(
                    f"{len(missing)} rows of the {split} split have no {column}, the first is row {missing[0] + 1}"
                )


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")
