"""What is to be learnt of each row, whatever the data call it: one class, a number, or several labels."""

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, words
from lib.data.labels.multi_label import encode_label_sets, is_list
from lib.data.labels.single_label import (
    check_labelled,
    encode_labels,
    is_label,
    label_counts,
    leave_out_hidden,
    replace_labels,
)
from lib.errors import UserError

Splits = dict[str, Dataset]


def encode_targets(
    splits: Splits,
    columns: tuple[str, ...],
    wanted: str,
    model_names: list[str] | None,
    model_problem: str | None,
    notes: list[str],
) -> tuple[Splits, list[str], str]:
    """Add a column `labels` to every split: class numbers, numbers, or 0 and 1 for each of several labels.

    `wanted` is --problem_type; with `model_names`, the outputs of an existing model rule, and what `model_problem` says
    they are. Gives the splits, the names of the outputs and the problem. Raises UserError for whatever does not fit.
    """
    problem = find_problem(splits, columns, wanted, model_problem)
    if problem == MULTI_LABEL:
        return *encode_label_sets(splits, columns, model_names, notes), problem
    if len(columns) > 1:
        raise UserError(f"--label_columns {' '.join(columns)}: {words(problem)} has one column; use --label_column")
    encode = encode_numbers if problem == REGRESSION else encode_labels
    return *encode(splits, columns[0], model_names, notes), problem


def find_problem(splits: Splits, columns: tuple[str, ...], wanted: str, model_problem: str | None) -> str:
    """What --problem_type says, else what the model is, else what the labels of train look like.

    Real numbers are to be predicted as numbers; lists, or several columns, are several labels; whole numbers are classes.
    """
    if wanted != "auto" and model_problem not in (None, wanted):
        raise UserError(f"--problem_type {wanted}: the model is one of {words(str(model_problem))}")
    if wanted != "auto":
        return wanted
    if model_problem is not None:
        return model_problem
    dataset = splits.get("train", next(iter(splits.values())))
    if len(columns) > 1 or is_list(dataset.features[columns[0]]):
        return MULTI_LABEL
    labels = [] if isinstance(dataset.features[columns[0]], ClassLabel) else dataset[columns[0]][:]
    real = any(isinstance(label, float) and is_label(label) and not label.is_integer() for label in labels)
    return REGRESSION if real else CLASSIFICATION


def encode_numbers(
    splits: Splits, column: str, model_names: list[str] | None, notes: list[str]
) -> tuple[Splits, list[str]]:
    """Add a column `labels` with numbers, float32, to every split; the only output has the name of the column.

    A test split without any label is left out, also where -1 stands for each of them, as in GLUE.
    Raises UserError for unlabeled rows, text, numbers that are not finite, and one value only.
    """
    numbers = {split: read_numbers(dataset, column) for split, dataset in splits.items()}
    leave_out_hidden(numbers, notes)
    for split, values in numbers.items():
        check_labelled(values, split, column, is_number)
        endless = next((row for row, value in enumerate(values, 1) if not np.isfinite(value)), None)
        if endless is not None:
            raise UserError(f"row {endless} of the {split} split has the {column} {values[endless - 1]}")
    if len(set(numbers.get("train", [0, 1]))) < 2:
        raise UserError(f"--label_column {column} holds one value only, {numbers['train'][0]:g}")
    feature = Value("float32")
    encoded = {split: replace_labels(splits[split], values, feature) for split, values in numbers.items()}
    return encoded, model_names or [column]


def read_numbers(dataset: Dataset, column: str) -> list[Any]:
    """The labels as floats, None where one is missing or all are hidden. Raises UserError for anything that is no number."""
    values = dataset[column][:]
    for row, value in enumerate(values, 1):
        if not (value is None or value == "" or isinstance(value, int | float)):
            kind = "lists" if isinstance(value, list | dict) else f"text such as {value!r}"
            raise UserError(f"--label_column {column} holds {kind} (row {row}): regression needs numbers")
    hidden = all(not is_label(value) for value in values)  # -1 in every row
    return [float(value) if is_number(value) and not hidden else None for value in values]


def is_number(value: Any) -> bool:
    return value not in (None, "") and value == value


def model_problem(config: Any) -> str | None:
    """What a classifier's configuration says that it is, or what its one output implies; None when it says nothing."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else None)


def label_lines(labels: Any, names: list[str], problem: str) -> str:
    """What the labels of a split are, in a line: counts, or for numbers their range."""
    values = np.asarray(labels)
    if problem == REGRESSION:
        return f"{names[0]}, from {values.min():g} to {values.max():g}, mean {values.mean():.3g}"
    counts = values.sum(axis=0) if problem == MULTI_LABEL else np.array(label_counts(labels, len(names)))
    shown = ", ".join(f"{name} {int(count):,}" for name, count in zip(names[:20], counts, strict=False))
    return f"{shown}{', ...' if len(names) > 20 else ''}{' (several a text)' if problem == MULTI_LABEL else ''}"
