"""Regression: labels that are numbers."""

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from lib.data.labels.names import listed
from lib.data.labels.numerals import read_number
from lib.data.labels.stored import Stored, read_column
from lib.data.labels.targets import LEFT_OUT, Targets, check_labeled, has_no_labels, is_hidden_mark
from lib.errors import UserError

LIMIT = float(np.finfo(np.float32).max)


def encode_numbers(splits: dict[str, Dataset], column: str, model_names: list[str] | None = None) -> Targets:
    """Numbers as they are, float32; the only output has the name of the column, or that of an existing model.

    Text is read as numbers. A test split without any label is left out; -1 in every row stands for hidden labels, as in
    GLUE.

    Raises UserError for unlabeled rows, text that is no number, lists, numbers beyond float32, and a single value in all
    rows of train, and a model with several outputs.
    """
    if model_names is not None and len(model_names) != 1:
        raise UserError(
            f"--label_column {column} holds numbers, but the model has {len(model_names)} outputs, {listed(model_names)}; "
            "score it on its classes, or give --problem_type single_label_classification"
        )
    labels, notes = dict[str, np.ndarray](), tuple[str, ...]()
    for split, dataset in splits.items():
        if not isinstance(dataset.features[column], ClassLabel | Value):
            raise UserError(f"--label_column {column} holds lists (row 1), but regression needs numbers")
        stored = read_column(dataset, column)
        missing = stored.missing
        if all(map(is_hidden_mark, stored.present)):
            missing = np.ones(len(stored), dtype=bool)
        if has_no_labels(split, missing, splits):
            notes += (LEFT_OUT,)
            continue
        numbers = read_numbers(stored, split, column)
        check_labeled(missing, split, column)
        labels[split], noted = round_numbers(stored, numbers, split, column)
        notes += noted
    train = labels.get("train")
    if train is not None and bool((train == train[0]).all()):
        raise UserError(f"--label_column {column} holds one value only, {train[0]:g}")
    return Targets(labels, model_names or [column], notes)


def read_numbers(stored: Stored, split: str, column: str) -> np.ndarray:
    """The distinct values as float64, NaN where one is missing. Raises UserError, with the row, for text that is no number."""
    numbers = np.full(len(stored.values), np.nan)
    for place, value in enumerate(stored.values):
        number = read_number(value) if isinstance(value, str) else value
        if number is None and value is not None:
            hint = "; write decimals with a point" if comma_number(value) else ""
            raise UserError(
                f"--label_column {column} holds text such as {value!r} (row {stored.row(place)} of the {split} split), "
                f"but regression needs numbers{hint}"
            )
        numbers[place] = np.nan if number is None else float(min(max(number, -1e300), 1e300))
    return numbers


def comma_number(text: Any) -> bool:
    return isinstance(text, str) and text.count(",") == 1 and read_number(text.replace(",", ".")) is not None


def round_numbers(stored: Stored, numbers: np.ndarray, split: str, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels of all rows as float32, and a warning where a tenth of the different ones become equal.

    Raises UserError, with the row, for a number that float32 would turn into infinity or 0.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = numbers.astype(np.float32)
    beyond = np.flatnonzero(~np.isfinite(rounded) | ((rounded == 0) & (numbers != 0)))
    if len(beyond):
        place = int(beyond[0])
        raise UserError(
            f"row {stored.row(place)} of the {split} split has the {column} {stored.values[place]}, which is outside "
            f"float32 (1e-45 to {LIMIT:.1e}, in which models compute); scale the numbers or remove the row"
        )
    different, left = len(np.unique(numbers)), len(np.unique(rounded))
    note = f"warning: float32 keeps {left} of the {different} different values of {column} in the {split} split apart"
    return rounded[stored.places], (note,) if left < 0.9 * different else ()
