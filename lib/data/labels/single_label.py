"""Single-label classification: class names and numbers, whatever form the labels are stored in."""

from typing import Any

from datasets import ClassLabel, Dataset, Value

from lib.data.labels.targets import (
    Labels,
    Targets,
    check_labeled,
    is_label,
    leave_out_hidden,
    match_model,
    sort_values,
)
from lib.errors import UserError

NAME_COLUMNS = ("label_text", "label_name", "label_names")
"""Columns that spell out an integer label."""


def encode_classes(splits: dict[str, Dataset], column: str, model_names: list[str] | None = None) -> Targets:
    """Class numbers 0 to n-1, int64; gaps between integer labels are closed.

    Names come from a ClassLabel, from string labels, from a column such as label_text beside integers, or are the
    integers as text. With `model_names`, classes and their order are those of an existing model. A test split without any
    label is left out.

    Raises UserError for unlabeled rows, labels that are not in train, a single class, real numbers and lists.
    """
    labels, notes = leave_out_hidden({split: read_classes(dataset, column) for split, dataset in splits.items()})
    for split, given in labels.items():
        hint = "; -1 stands for a hidden label, write a class as another number or a word" if -1 in given else ""
        check_labeled([label if is_label(label) else None for label in given], split, column, hint)
    known = labels["train"] if "train" in labels else [label for given in labels.values() for label in given]
    values, names = name_classes(next(iter(splits.values())), known, column)
    if model_names is not None:
        values, names = match_model(values, names, model_names)
    elif len(set(known)) < 2:
        raise UserError(f"--label_column {column} holds one class only, {known[0]!r}; a classifier needs two")
    numbers = {value: number for number, value in enumerate(values)}
    for split, given in labels.items():
        unknown = [(row, label) for row, label in enumerate(given, 1) if label not in numbers]
        if unknown:
            raise UserError(
                f"{len(unknown)} rows of the {split} split have a {column} that is not among the classes "
                f"({', '.join(map(str, list(numbers)[:20]))}): the first is row {unknown[0][0]} with {unknown[0][1]!r}"
            )
    encoded = {split: [numbers[label] for label in given] for split, given in labels.items()}
    return Targets(encoded, Value("int64"), names, notes)


def read_classes(dataset: Dataset, column: str) -> Labels:
    """Labels as stored; of a ClassLabel the names, since splits may number the same names differently.

    Whole numbers stored as floats, as csv readers make of a column with gaps, become integers.
    Raises UserError for real numbers and for lists, which are another problem type.
    """
    feature, labels = dataset.features[column], dataset[column][:]
    if isinstance(feature, ClassLabel):
        return [feature.names[label] if is_label(label) else None for label in labels]
    if any(isinstance(label, list | dict) for label in labels):
        raise UserError(
            f"--label_column {column} holds lists, but single-label classification needs one class for each row; "
            "for several use --problem_type multi_label_classification"
        )
    floats = [label for label in labels if isinstance(label, float) and is_label(label)]
    real = next((label for label in floats if not label.is_integer()), None)
    if real is not None:
        raise UserError(
            f"--label_column {column} holds real numbers such as {real}, but classification needs classes; "
            "to predict numbers use --problem_type regression"
        )
    return [int(label) if isinstance(label, float) and is_label(label) else label for label in labels]


def name_classes(dataset: Dataset, labels: Labels, column: str) -> tuple[Labels, list[str]]:
    """The distinct labels in order of their class number, and the names of the classes."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names), list(feature.names)
    values = sort_values(set(labels), column)
    if len(values) > max(50, len(labels) // 2):
        hint = "" if isinstance(values[0], str) else " To predict numbers use --problem_type regression."
        raise UserError(
            f"--label_column {column} has {len(values)} different values in {len(labels)} rows; is it the label?{hint}"
        )
    spelled = next((name for name in NAME_COLUMNS if name in dataset.column_names and name != column), None)
    if spelled and all(isinstance(value, int) for value in values):
        spelling: dict[Any, Any] = dict(zip(dataset[column], dataset[spelled], strict=True))
        names = [spelling.get(value) for value in values]
        if all(names) and len(set(names)) == len(names):
            return values, [str(name) for name in names]
    return values, [str(value) for value in values]
