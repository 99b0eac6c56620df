"""Targets: the column `labels` that a model learns, and the checks that all kinds of labels share."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from lib.config.sections import CLASSIFICATION, MULTI_LABEL
from lib.data.labels.names import is_blank, quoted
from lib.data.labels.numerals import INTEGER, WHOLE
from lib.data.labels.stored import Stored
from lib.errors import UserError

LEFT_OUT = "the test split has no labels and is left out; results are those on validation"


@dataclasses.dataclass(frozen=True)
class Targets:
    """The encoded labels of each split, and the names of the model's outputs.

    Labels are class numbers, int64 (rows,); numbers, float32 (rows,); or multi-hot or probabilities, float32 (rows, names).
    `notes` are sentences for the log.
    """

    labels: dict[str, np.ndarray]
    names: list[str]
    notes: tuple[str, ...] = ()


def feature_of(labels: np.ndarray) -> Any:
    """The `datasets` feature of encoded labels: a matrix becomes a list for each row."""
    return Value(str(labels.dtype)) if labels.ndim == 1 else List(Value(str(labels.dtype)))


def as_arrow(labels: np.ndarray) -> Any:
    """Labels as an Arrow array of the type of `feature_of`."""
    kind = Features({"labels": feature_of(labels)}).arrow_schema.field("labels").type
    if labels.ndim == 1:
        return pa.array(labels, type=kind)
    ends = np.arange(len(labels) + 1, dtype=np.int64) * labels.shape[1]
    rows = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(labels.ravel(), type=kind.value_type))
    return rows.cast(kind)


def hard_labels(labels: np.ndarray, problem: str) -> np.ndarray:
    """The labels that scores count: of probabilities the most probable class, the first of equal ones.

    Of multi-label probabilities 1 where they are 0.5 or more, else 0; all other labels stay as they are.
    """
    if problem == CLASSIFICATION and labels.ndim == 2:
        return labels.argmax(axis=1)
    return (labels >= 0.5).astype(labels.dtype) if problem == MULTI_LABEL else labels


def is_hidden_mark(value: Any) -> bool:
    """Whether a stored value is -1, which stands for a hidden label."""
    if isinstance(value, str):
        whole = WHOLE.fullmatch(value)
        return (whole[1] if whole else value) == "-1"
    return value == -1


def is_numeric(value: Any) -> bool:
    return not isinstance(value, str) or bool(INTEGER.fullmatch(value) or WHOLE.fullmatch(value))


def hide_marks(splits: dict[str, Stored], kept: Collection[str] = ()) -> tuple[dict[str, Stored], dict[str, bool]]:
    """The labels with None for -1, and whether each split had any; where -1 is a class, it stays.

    It is one if it is among the names in `kept`, and if train has it beside words.
    """
    known = [splits["train"]] if "train" in splits else list(splits.values())
    values = [value for stored in known for value in stored.present]
    if "-1" in kept or ("-1" in values and not all(map(is_numeric, values))):
        return splits, dict.fromkeys(splits, False)
    had = {
        split: all(map(is_numeric, stored.present)) and any(map(is_hidden_mark, stored.present))
        for split, stored in splits.items()
    }
    return {
        split: stored.replaced([None if is_hidden_mark(value) else value for value in stored.values])
        if had[split]
        else stored
        for split, stored in splits.items()
    }, had


def has_no_labels(split: str, missing: np.ndarray, splits: Collection[str]) -> bool:
    """Whether this is a test split, beside others, without any label."""
    return split == "test" and len(splits) > 1 and bool(missing.all())


def check_labeled(missing: np.ndarray, split: str, column: str, hint: str = "") -> None:
    """Raise UserError, with the row numbers and `hint`, where labels are missing."""
    rows = np.flatnonzero(missing)
    if len(rows):
        some = ", ".join(str(row + 1) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
        raise UserError(
            f"{len(rows)} of {len(missing)} rows of the {split} split have no {column}: rows {some}; "
            f"label or remove them{hint}"
        )


def check_blank(stored: Stored, split: str, column: str) -> None:
    """Raise UserError, with the row, for a label of spaces or of signs that cannot be seen."""
    for place, value in enumerate(stored.values):
        if isinstance(value, str) and is_blank(value):
            raise UserError(
                f"row {stored.row(place)} of the {split} split has a blank {column}, {quoted(value)}; "
                "label or remove it"
            )
