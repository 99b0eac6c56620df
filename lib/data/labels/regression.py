"""Regression: labels that are numbers."""

from typing import Any

import numpy as np
from datasets import Dataset, Value

from lib.data.labels.targets import Labels, Targets, check_labeled, is_label, leave_out_hidden
from lib.errors import UserError


def encode_numbers(splits: dict[str, Dataset], column: str, model_names: list[str] | None = None) -> Targets:
    """Numbers as they are, float32; the only output has the name of the column, or that of an existing model.

    A test split without any label is left out; -1 in every row stands for hidden labels, as in GLUE.

    Raises UserError for unlabeled rows, text, lists, infinite numbers, and a single value in all rows of train.
    """
    numbers, notes = leave_out_hidden({split: read_numbers(dataset, column) for split, dataset in splits.items()})
    for split, values in numbers.items():
        check_labeled(values, split, column)
        infinite = next((row for row, value in enumerate(values, 1) if not np.isfinite(value)), None)
        if infinite is not None:
            raise UserError(f"row {infinite} of the {split} split has the {column} {values[infinite - 1]}")
    if len(set(numbers.get("train", [0, 1]))) < 2:
        raise UserError(f"--label_column {column} holds one value only, {numbers['train'][0]:g}")
    return Targets(numbers, Value("float32"), model_names or [column], notes)


def read_numbers(dataset: Dataset, column: str) -> Labels:
    """The labels as floats, None where one is missing or all are hidden. Raises UserError for text and lists."""
    values = dataset[column][:]
    for row, value in enumerate(values, 1):
        if not (value is None or value == "" or isinstance(value, int | float)):
            kind = "lists" if isinstance(value, list | dict) else f"text such as {value!r}"
            raise UserError(f"--label_column {column} holds {kind} (row {row}), but regression needs numbers")
    hidden = not any(map(is_label, values))

    def is_number(value: Any) -> bool:
        return value not in (None, "") and value == value

    return [float(value) if is_number(value) and not hidden else None for value in values]
