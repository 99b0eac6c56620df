"""Whether labels make a problem of classification, regression or multi-label classification, and the targets of each."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, words
from lib.data.labels.multi_label import encode_label_sets
from lib.data.labels.numerals import (
    INTEGER,
    are_integers,
    are_plain,
    are_written_alike,
    have_equal_decimals,
    have_fractions,
)
from lib.data.labels.regression import encode_numbers
from lib.data.labels.single_label import encode_classes
from lib.data.labels.stored import Stored, read_column
from lib.data.labels.targets import Targets, is_hidden_mark
from lib.data.labels.text_lists import is_written_list, suspected_separator
from lib.errors import UserError
from lib.runtime.screen import list_some, shorten


def find_problem(
    splits: dict[str, Dataset],
    columns: tuple[str, ...],
    wanted: str,
    model_problem: str | None,
    names: Sequence[str] = (),
) -> tuple[str, tuple[str, ...]]:
    """The problem type, and notes on how it was found.

    It is `wanted` (--problem_type) unless that is `auto`, else the model's, else as the labels look: numbers with
    fractions in all rows of all splits are regression; lists, also as text, and several columns are multi-label
    classification; all else are classes. Labels that are among `names` are classes.

    Raises UserError when the model is for another problem type than is wanted, and for text that may be one or the other.
    """
    if wanted != "auto":
        if model_problem not in (None, wanted):
            raise UserError(f"--problem_type {wanted}: the model is for {words(str(model_problem))}")
        return wanted, ()
    if model_problem is not None:
        return model_problem, ()
    column = columns[0]
    features = {split: dataset.features[column] for split, dataset in splits.items()}
    if len(columns) > 1 or any(not isinstance(feature, ClassLabel | Value) for feature in features.values()):
        return MULTI_LABEL, ()
    if any(isinstance(feature, ClassLabel) for feature in features.values()):
        return CLASSIFICATION, ()
    stored = {split: read_column(dataset, column) for split, dataset in splits.items()}
    labeled = {split: labels for split, labels in stored.items() if not all(map(is_hidden_mark, labels.present))}
    known = labeled.get("train") or next(iter(labeled.values()), Stored([], np.zeros(0, dtype=np.int64)))
    if any(isinstance(value, str) for value in known.values):
        return find_text_problem(labeled, known, column, set(names))
    floats = [value for value in known.values if isinstance(value, float)]
    if any(not value.is_integer() for value in floats):
        return REGRESSION, (
            f"the column {column} holds numbers with fractions: regression (set --problem_type to change)",
        )
    return CLASSIFICATION, (whole_note(column, f"{floats[0]}"),) if floats else ()


def find_text_problem(
    labeled: dict[str, Stored], known: Stored, column: str, names: set[str]
) -> tuple[str, tuple[str, ...]]:
    """The problem type of labels that are text, and notes. Raises UserError with --problem_type for what may be two kinds."""
    texts = [str(value) for value in known.present]
    if set(texts) <= names or are_integers(texts):
        return CLASSIFICATION, ()
    if are_plain(texts) and not have_fractions(texts):
        return CLASSIFICATION, (whole_note(column, next(text for text in texts if not INTEGER.fullmatch(text))),)
    fractions = [text for text in texts if are_plain([text]) and have_fractions([text])]
    every = [[str(value) for value in stored.present] for stored in labeled.values()]
    # Fixed decimals in train, such as 0.50, beside 0.5 elsewhere are numbers; 1.1 in train beside 1.10 may be sections.
    fixed = have_equal_decimals(texts)
    alike = are_written_alike([*itertools.chain(*every)]) or (fixed and all(map(are_written_alike, every)))
    if fractions and alike and all(map(are_plain, every)):
        return REGRESSION, (
            f"the column {column} holds numbers with fractions: regression (set --problem_type to change)",
        )
    if fractions and (are_plain(texts) or 2 * len(fractions) >= len(texts)):
        split, row, text, other = odd_number(labeled, fractions[0], fixed)
        raise UserError(
            f"row {row} of the {split} split has the {column} {text!r}, which is not written like others, such as "
            f"{other!r}; are they numbers or codes? Give --problem_type regression to read numbers, or "
            "single_label_classification for classes as they are written"
        )
    lists = [is_written_list(text) for text in texts]
    if all(lists):
        return MULTI_LABEL, (
            f"the column {column} holds lists written as text: multi-label (set --problem_type to change)",
        )
    separator = suspected_separator(texts)
    if 2 * sum(lists) >= len(lists) or separator:
        example = next(
            text for text, is_list in zip(texts, lists, strict=True) if (separator and separator in text) or is_list
        )
        apart = f", split at {separator!r}" if separator else ""
        raise UserError(
            f"--label_column {column} may hold several labels in one, such as {example!r} (row "
            f"{known.row(known.values.index(example))}). Give --problem_type multi_label_classification to read several"
            f"{apart}, or single_label_classification for classes as they are written"
        )
    return CLASSIFICATION, ()


def odd_number(labeled: dict[str, Stored], example: str, fixed: bool) -> tuple[str, int, str, str]:
    """Split, row and text of the first label that is no number or is written in another way, and one that it differs from.

    That is `example` of train or, where train has `fixed` decimals, one of its own split.
    """
    odd = []
    for split, stored in labeled.items():
        own = (text for text in map(str, stored.present) if are_plain([text]) and have_fractions([text]))
        other = next(own, example) if fixed else example
        for place, value in enumerate(stored.values):
            if value is not None and not (are_plain([str(value)]) and are_written_alike([other, str(value)])):
                odd.append((split, stored.row(place), str(value), other))
    return min(odd, key=lambda found: (found[0] != "train", found[1])) if odd else ("train", 1, example, example)


def whole_note(column: str, example: str) -> str:
    return f"the column {column} holds whole numbers such as {example}, read as classes; for numbers: --problem_type regression"


def encode_targets(
    splits: dict[str, Dataset],
    columns: tuple[str, ...],
    problem: str,
    model_names: list[str] | None = None,
    order: Sequence[str] = (),
) -> Targets:
    """The targets for a problem type. With `model_names`, outputs and their order are those of an existing model.

    `order` is --label_order. Raises UserError for labels that do not fit the problem type, the order or the model.
    """
    if problem == MULTI_LABEL:
        return encode_label_sets(splits, columns, model_names, order)
    if len(columns) > 1:
        raise UserError(f"--label_columns {' '.join(columns)}: {words(problem)} has one column; use --label_column")
    if problem == REGRESSION:
        if order:
            raise UserError(f"--label_order {order[0]} ...: regression has numbers, not classes; leave it out")
        return encode_numbers(splits, columns[0], model_names)
    return encode_classes(splits, columns[0], model_names, order)


def model_problem(config: Any) -> str | None:
    """The problem type in a classifier's configuration, regression for a single output; None where it is not stated."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else None)


def count_labels(labels: Any, names: list[str], problem: str) -> dict[str, int]:
    """Rows of each class or label of a split; empty for numbers."""
    if problem == REGRESSION:
        return {}
    values = np.asarray(labels)
    counts = values.sum(axis=0, dtype=np.int64) if problem == MULTI_LABEL else np.bincount(values, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def summarize_labels(labels: Any, names: list[str], problem: str) -> str:
    """The labels of a split in one line: rows of each class or label; of numbers range and mean."""
    values = np.asarray(labels)
    if problem == REGRESSION:
        return f"{shorten(names[0], 40)}, from {values.min():g} to {values.max():g}, mean {values.mean():.3g}"
    shown = [f"{shorten(name, 40)} {count:,}" for name, count in count_labels(values, names, problem).items()]
    return f"{list_some(shown, 20)}{' (multi-label)' if problem == MULTI_LABEL else ''}"
