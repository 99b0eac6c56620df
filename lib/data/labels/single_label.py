"""Label names and class numbers, from whatever a data set calls its labels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from lib.errors import UserError

NAME_COLUMNS = ("label_text", "label_name", "label_names")
"""Columns that spell out an integer label."""

Labels = list[Any]


def encode_labels(
    splits: dict[str, Dataset], column: str, model_names: list[str] | None, notes: list[str]
) -> tuple[dict[str, Dataset], list[str]]:
    """Add a column `labels` with class numbers 0..n-1 to every split, and name the classes.

    Names come from a ClassLabel, from the strings themselves, from a column such as label_text beside integers, or are
    the integers as text; gaps between integers are closed. With `model_names`, the classes of an existing model rule.
    A test split without any label is left out.

    Raises UserError for unlabeled rows, labels that are not in train, one class only, and real numbers.
    """
    labels = {split: read_labels(dataset, column) for split, dataset in splits.items()}
    leave_out_hidden(labels, notes)
    for split, given in labels.items():
        check_labelled(given, split, column)
    first = next(iter(splits.values()))
    known = labels["train"] if "train" in labels else all_labels(labels)
    values, names = label_values(first, known, column)
    if model_names is not None:
        values, names = match_model(values, names, model_names)
    elif len(set(known)) < 2:
        raise UserError(f"--label_column {column} holds one class only, {known[0]!r}; a classifier needs two")
    numbers = {value: number for number, value in enumerate(values)}
    encoded = {}
    for split, given in labels.items():
        check_known(given, numbers, split, column)
        encoded[split] = replace_labels(splits[split], [numbers[label] for label in given], Value("int64"))
    return encoded, names


def leave_out_hidden(labels: dict[str, Labels], notes: list[str]) -> None:
    """Drop a test split none of whose rows is labelled, but not when it is all there is; -1 stands for a hidden label."""
    given = labels.get("test", [])
    if len(labels) > 1 and "test" in labels and not any(is_label(label) and label not in ([], [-1]) for label in given):
        notes.append("the test split has no labels and is left out; results are those on validation")
        del labels["test"]


def replace_labels(dataset: Dataset, labels: Labels, feature: Any) -> Dataset:
    """The data set with `labels` as its column of that name."""
    dataset = dataset.remove_columns([c for c in ("labels",) if c in dataset.column_names])
    return dataset.add_column("labels", labels, feature=feature)


def all_labels(labels: dict[str, Labels]) -> Labels:
    return [label for given in labels.values() for label in given]


def read_labels(dataset: Dataset, column: str) -> Labels:
    """Labels as stored, but names for a ClassLabel, so that splits which number the same names differently agree.

    Whole numbers stored as floats, as readers of csv files with gaps make them, become integers. Raises UserError for
    real numbers and for lists, which are problems of their own (targets.py).
    """
    feature, labels = dataset.features[column], dataset[column][:]
    if isinstance(feature, ClassLabel):
        return [feature.names[label] if is_label(label) else None for label in labels]
    if any(isinstance(label, list | dict) for label in labels):
        raise UserError(
            f"--label_column {column} holds lists: one class a row is needed; several are learnt "
            "with --problem_type multi_label_classification"
        )
    floats = [label for label in labels if isinstance(label, float) and is_label(label)]
    real = next((label for label in floats if not label.is_integer()), None)
    if real is not None:
        raise UserError(
            f"--label_column {column} holds real numbers such as {real}: classes are needed; numbers are learnt "
            "with --problem_type regression"
        )
    return [int(label) if isinstance(label, float) and is_label(label) else label for label in labels]


def is_label(label: Any) -> bool:
    """Whether a row is labelled: not missing, not empty, not NaN, not the -1 that stands for a hidden label."""
    return label is not None and label not in ("", -1) and label == label


def check_labelled(labels: Labels, split: str, column: str, is_given: Callable[[Any], bool] = is_label) -> None:
    """Raise UserError for rows without a label, by their number; `is_given` tells what is one."""
    bare = [row for row, label in enumerate(labels, 1) if not is_given(label)]
    if bare:
        rows = ", ".join(map(str, bare[:5])) + (", ..." if len(bare) > 5 else "")
        hint = (
            "; -1 stands for a hidden label, write a class as another number or a word"
            if -1 in labels and is_given is is_label
            else ""
        )
        raise UserError(
            f"{len(bare)} of {len(labels)} rows of the {split} split have no {column}: rows {rows}; "
            f"label or remove them{hint}"
        )


def label_values(dataset: Dataset, labels: Labels, column: str) -> tuple[Labels, list[str]]:
    """The different labels in order of their class number, and the names of the classes."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names), list(feature.names)
    values = sort_values(set(labels), column)
    if len(values) > max(50, len(labels) // 2):
        numbers = " A number is --problem_type regression." if not isinstance(values[0], str) else ""
        raise UserError(
            f"--label_column {column} has {len(values)} different values in {len(labels)} rows; is it the label?{numbers}"
        )
    spelled = next((name for name in NAME_COLUMNS if name in dataset.column_names and name != column), None)
    if spelled and all(isinstance(value, int) for value in values):
        spelling = dict(zip(dataset[column], dataset[spelled], strict=True))
        names = [spelling.get(value) for value in values]
        if all(names) and len(set(names)) == len(names):
            return values, [str(name) for name in names]
    return values, [str(value) for value in values]


def sort_values(different: set[Any], column: str) -> Labels:
    """Different labels in their order; raises UserError for text beside numbers."""
    texts = [value for value in different if isinstance(value, str)]
    if 0 < len(texts) < len(different):
        number = next(value for value in different if not isinstance(value, str))
        raise UserError(
            f"--label_column {column} holds text and numbers, such as {texts[0]!r} and {number}; use one of them"
        )
    return sorted(different)


def check_known(labels: Labels, known: dict[Any, int], split: str, column: str) -> None:
    strange = [(row, label) for row, label in enumerate(labels, 1) if label not in known]
    if strange:
        row, label = strange[0]
        names = ", ".join(map(str, list(known)[:20]))
        raise UserError(
            f"{len(strange)} rows of the {split} split have a {column} that is not among the classes ({names}): "
            f"the first is row {row} with {label!r}"
        )


def match_model(values: Labels, names: list[str], model_names: Sequence[str]) -> tuple[Labels, list[str]]:
    """Order the labels of the data as the classes of a model: by name, else by number when the model has no names.

    Raises UserError when neither fits.
    """
    position = {name.lower(): number for number, name in enumerate(model_names)}
    position |= {name: number for number, name in enumerate(model_names)}
    places = [position.get(name, position.get(name.lower(), -1)) for name in names]
    if -1 not in places and len(set(places)) == len(places):
        ordered: Labels = [object()] * len(model_names)
        for value, place in zip(values, places, strict=True):
            ordered[place] = value
        return ordered, list(model_names)
    if len(names) == len(model_names) and all(name == f"LABEL_{i}" for i, name in enumerate(model_names)):
        return values, names
    raise UserError(
        f"the model's classes ({', '.join(model_names)}) are not those of the data ({', '.join(names)}); "
        "score a model trained on these labels"
    )


def label_counts(labels: Sequence[int], number: int) -> list[int]:
    return np.bincount(np.asarray(labels, dtype=np.int64), minlength=number).tolist()
