"""Whether labels make a problem of classification, regression or multi-label classification, and the targets of each."""

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, words
from lib.data.labels.multi_label import encode_label_sets
from lib.data.labels.regression import encode_numbers
from lib.data.labels.single_label import encode_classes
from lib.data.labels.targets import Targets, is_label
from lib.errors import UserError
from lib.runtime.screen import list_some, shorten


def find_problem(splits: dict[str, Dataset], columns: tuple[str, ...], wanted: str, model_problem: str | None) -> str:
    """The problem type: `wanted` (--problem_type) unless it is `auto`, else the model's, else as the labels of train look.

    Real numbers are regression; lists and several columns are multi-label classification; all else are classes.
    Raises UserError when the model is for another problem type than is wanted.
    """
    if wanted != "auto":
        if model_problem not in (None, wanted):
            raise UserError(f"--problem_type {wanted}: the model is for {words(str(model_problem))}")
        return wanted
    if model_problem is not None:
        return model_problem
    dataset = splits.get("train", next(iter(splits.values())))
    feature = dataset.features[columns[0]]
    if len(columns) > 1 or isinstance(feature, List | LargeList | list):
        return MULTI_LABEL
    labels = [] if isinstance(feature, ClassLabel) else dataset[columns[0]][:]
    real = any(isinstance(label, float) and is_label(label) and not label.is_integer() for label in labels)
    return REGRESSION if real else CLASSIFICATION


def encode_targets(
    splits: dict[str, Dataset], columns: tuple[str, ...], problem: str, model_names: list[str] | None = None
) -> Targets:
    """The targets for a problem type. With `model_names`, outputs and their order are those of an existing model.

    Raises UserError for labels that do not fit the problem type or the model.
    """
    if problem == MULTI_LABEL:
        return encode_label_sets(splits, columns, model_names)
    if len(columns) > 1:
        raise UserError(f"--label_columns {' '.join(columns)}: {words(problem)} has one column; use --label_column")
    encode = encode_numbers if problem == REGRESSION else encode_classes
    return encode(splits, columns[0], model_names)


def model_problem(config: Any) -> str | None:
    """The problem type in a classifier's configuration, regression for a single output; None where it is not stated."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else None)


def summarize_labels(labels: Any, names: list[str], problem: str) -> str:
    """The labels of a split in one line: rows of each class or label; of numbers range and mean."""
    values = np.asarray(labels)
    if problem == REGRESSION:
        return f"{shorten(names[0], 40)}, from {values.min():g} to {values.max():g}, mean {values.mean():.3g}"
    counts = (
        values.sum(axis=0) if problem == MULTI_LABEL else np.bincount(values.astype(np.int64), minlength=len(names))
    )
    shown = [f"{shorten(name, 40)} {int(count):,}" for name, count in zip(names, counts, strict=True)]
    return f"{list_some(shown, 20)}{' (multi-label)' if problem == MULTI_LABEL else ''}"
