"""Single-label classification: class names and numbers, whatever form the labels are stored in."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from lib.data.labels.names import (
    check_names,
    in_order,
    listed,
    look_alike_notes,
    match_model,
    put_in_order,
    quoted,
    resembling,
    same_number,
)
from lib.data.labels.numerals import are_integers, read_number
from lib.data.labels.stored import Stored, read_column, spell_alike
from lib.data.labels.targets import LEFT_OUT, Targets, check_blank, check_labeled, has_no_labels, hide_marks
from lib.errors import UserError

NAME_COLUMNS = ("label_text", "label_name", "label_names")
"""Columns that spell out an integer label."""


def encode_classes(
    splits: dict[str, Dataset], column: str, model_names: list[str] | None = None, order: Sequence[str] = ()
) -> Targets:
    """Class numbers 0 to n-1, int64; gaps between integer labels are closed.

    Classes are named as they are written, or by a ClassLabel, or by a column such as label_text beside integers. They are
    in the order of the ClassLabel, of `order` (--label_order), of numbers, or of their characters. With `model_names`,
    classes and their order are those of an existing model. A test split without any label is left out.

    Raises UserError for unlabeled rows, blank labels, labels that are not in train, a single class, real numbers, lists,
    and a column such as label_text that disagrees with the labels.
    """
    stored = spell_alike({split: read_classes(dataset, column) for split, dataset in splits.items()})
    for split, labels in stored.items():
        check_blank(labels, split, column)
    named = {name for dataset in splits.values() for name in getattr(dataset.features[column], "names", ())}
    labeled, marked = hide_marks(stored, {*(model_names or ()), *order, *named})
    notes: tuple[str, ...] = ()
    for split, labels in list(labeled.items()):
        if has_no_labels(split, labels.missing, labeled):
            notes, labeled = (LEFT_OUT,), {other: given for other, given in labeled.items() if other != split}
            continue
        hint = "; -1 stands for a hidden label; if it is a class, name all in their order: --label_order -1 0 1"
        check_labeled(labels.missing, split, column, hint if marked[split] else "")
    first = "train" if "train" in labeled else next(iter(labeled))
    known = {first: labeled[first]} if first == "train" else labeled
    present = in_order({value for labels in known.values() for value in labels.values})
    classes = splits[first].features[column]
    if isinstance(classes, ClassLabel):
        values: list[Any] = list(classes.names)
        names, numbers = list(classes.names), list(range(len(values))) if whole_model(classes, model_names) else None
    else:
        values = present
        check_count(values, sum(map(len, known.values())), column)
        whole = not any(isinstance(value, str) for value in values) or are_integers(values)
        numbers = [int(value) for value in values] if whole else None
        names = [str(value) for value in values]
    spelled = spelled_names(splits, labeled, column) if numbers is not None else {}
    plain, wanted = names, {*(order or model_names or ())}
    if not isinstance(classes, ClassLabel) and all(name in spelled for name in names):
        names = [spelled[name] for name in names]
    check_names(names, column)
    keys = plain if set(plain) <= wanted and not set(names) <= wanted else names
    if model_names is not None:
        places, outputs, matched = match_model(keys, model_names, order, numbers)
        notes += matched
    else:
        if len(present) < 2:
            raise UserError(f"--label_column {column} holds one class only, {present[0]!r}; a classifier needs two")
        sequence = put_in_order(keys, order) if order else list(range(len(names)))
        outputs = [names[place] for place in sequence]
        places = np.argsort(sequence).tolist()
    number_of: dict[Any, int] = dict(zip(values, places, strict=True))
    encoded = {}
    for split, labels in labeled.items():
        encoded[split], noted = number_rows(labels, number_of, split, column)
        notes += noted
    counts = np.bincount(np.concatenate([encoded[split] for split in known]), minlength=len(outputs)).tolist()
    notes += look_alike_notes({name: count for name, count in zip(outputs, counts, strict=True) if count})
    return Targets(encoded, outputs, notes)


def read_classes(dataset: Dataset, column: str) -> Stored:
    """Labels as stored; of a ClassLabel the names, since splits may number the same names differently.

    Raises UserError for real numbers and for lists, which are another problem type.
    """
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel | Value):
        raise UserError(
            f"--label_column {column} holds lists, but single-label classification needs one class for each row; "
            "for several use --problem_type multi_label_classification"
        )
    stored = read_column(dataset, column)
    if isinstance(feature, ClassLabel):
        return stored.replaced([name_of(value, feature, column) for value in stored.values])
    real = next((value for value in stored.values if isinstance(value, float) and not value.is_integer()), None)
    if real is not None:
        raise UserError(
            f"--label_column {column} holds real numbers such as {real}, but classification needs classes; "
            "to predict numbers use --problem_type regression"
        )
    return stored


def name_of(value: Any, feature: ClassLabel, column: str) -> str | None:
    """The name of a ClassLabel's number; None where it is missing or -1. Raises UserError for a number without a name."""
    if value is None or value == -1:
        return None
    if not 0 <= value < len(feature.names):
        raise UserError(f"--label_column {column} holds the class number {value}, but names {listed(feature.names)}")
    return str(feature.names[value])


def whole_model(classes: ClassLabel, model_names: list[str] | None) -> bool:
    """Whether a model has as many outputs as there are classes, so that they can be matched by number."""
    return model_names is None or len(model_names) == len(classes.names)


def check_count(values: list[Any], rows: int, column: str) -> None:
    """Raise UserError where nearly every row has a label of its own."""
    if len(values) > max(50, rows // 2):
        numbers = 2 * sum(read_number(str(value)) is not None for value in values) > len(values)
        hint = " To predict numbers use --problem_type regression." if numbers else ""
        raise UserError(
            f"--label_column {column} has {len(values)} different values in {rows} rows; is it the label?{hint}"
        )


def spelled_names(splits: dict[str, Dataset], labels: dict[str, Stored], column: str) -> dict[str, str]:
    """The name of each label, as text, by a column such as label_text; empty where there is none.

    Raises UserError where that column gives one label two names, or two labels one name.
    """
    name_of, label_of = dict[str, str](), dict[str, str]()
    for split, given in labels.items():
        dataset = splits[split]
        spelled = next((name for name in NAME_COLUMNS if name in dataset.column_names and name != column), None)
        if spelled is None or not isinstance(dataset.features[spelled], Value):
            continue
        names = read_column(dataset, spelled)
        pairs, rows = np.unique(given.places * len(names.values) + names.places, return_index=True)
        for pair, row in sorted(zip(pairs.tolist(), rows.tolist(), strict=True), key=lambda item: item[1]):
            label, name = str(given.values[pair // len(names.values)]), names.values[pair % len(names.values)]
            if name is None:
                continue
            name = str(name)
            known = name_of.setdefault(label, name), label_of.setdefault(name, label)
            if known != (name, label):
                before = f"{label} is {quoted(known[0])}" if known[0] != name else f"{quoted(name)} is {known[1]}"
                raise UserError(
                    f"row {row + 1} of the {split} split has the {column} {label} and the {spelled} {quoted(name)}, but in "
                    f"an earlier row {before}; correct the rows, or remove the column {spelled}"
                )
    return name_of


def number_rows(
    labels: Stored, number_of: dict[Any, int], split: str, column: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class number of each row, int64, and notes. Raises UserError with the first row whose label is no class.

    1 and 1.0 are one class if train has one of them only.
    """
    numbers = [number_of.get(value, -1) for value in labels.values]
    texts, notes = [value for value in number_of if isinstance(value, str)], list[str]()
    for place, value in enumerate(labels.values):
        same = same_number(value, texts) if numbers[place] == -1 and isinstance(value, str) else None
        if same is not None and same not in labels.values:
            numbers[place] = number_of[same]
            notes.append(f"{column} {value} of the {split} split is read as {same}")
    encoded = np.array(numbers, dtype=np.int64)[labels.places]
    unknown = np.flatnonzero(encoded == -1)
    if len(unknown):
        value = labels.values[labels.places[unknown[0]]]
        hint = resembling(value, texts) if isinstance(value, str) else ""
        raise UserError(
            f"{len(unknown)} rows of the {split} split have a {column} that is not among the classes "
            f"({listed(number_of)}): the first is row {unknown[0] + 1} with {value!r}{hint}"
        )
    return encoded, tuple(notes)
