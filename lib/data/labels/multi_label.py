"""Several labels a row, from lists of names or numbers, from lists of 0 and 1, or from columns of 0 and 1."""

from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List, Value

from lib.data.labels.single_label import (
    check_labelled,
    is_label,
    leave_out_hidden,
    match_model,
    replace_labels,
    sort_values,
)
from lib.errors import UserError

LabelSets = list[list[Any] | None]
"""The labels of each row; None where it is not labelled."""


def encode_label_sets(
    splits: dict[str, Dataset], columns: tuple[str, ...], model_names: list[str] | None, notes: list[str]
) -> tuple[dict[str, Dataset], list[str]]:
    """Add a column `labels` with 0 or 1 for each label, float32, to every split, and name the labels.

    Names come from a ClassLabel, from the lists themselves, or are those of the columns. A row may have no label at all.
    With `model_names`, the labels of an existing model rule. A test split without any label is left out.

    Raises UserError for unlabeled rows, labels that are not in train, and fewer than two labels.
    """
    column = " ".join(columns)
    hot = hot_length(splits.get("train", next(iter(splits.values()))), columns)
    sets = {split: read_sets(dataset, columns, hot, split) for split, dataset in splits.items()}
    leave_out_hidden(sets, notes)
    for split, given in sets.items():
        check_labelled(given, split, column, lambda labels: labels is not None)
    values, names = name_labels(splits, sets, columns, hot)
    if model_names is not None:
        values, names = match_model(values, names, model_names)
        lacking = [name for name, value in zip(names, values, strict=True) if not isinstance(value, str | int | bool)]
        if len(columns) > 1 and lacking:
            raise UserError(
                f"--label_columns {column}: the model also has the labels {', '.join(lacking)}; name them all"
            )
    if len(values) < 2:
        raise UserError(f"--label_column {column}: {len(values)} label only; a classifier of two classes is for that")
    numbers = {value: number for number, value in enumerate(values)}
    feature = List(Value("float32"))
    for split, given in sets.items():
        check_sets(given, numbers, split, column)
    rows = {split: [multi_hot(labels, numbers) for labels in given] for split, given in sets.items()}
    if "train" in rows:
        never = [name for name, values in zip(names, zip(*rows["train"], strict=True), strict=True) if not any(values)]
        notes += [f"warning: no train row has the label {', '.join(never)}"] if never else []
    return {split: replace_labels(splits[split], values, feature) for split, values in rows.items()}, names


def is_list(feature: Any) -> bool:
    return isinstance(feature, List | LargeList | list)


def hot_length(dataset: Dataset, columns: tuple[str, ...]) -> int | None:
    """The length of lists of 0 and 1 that stand for labels by their place; None where lists name them.

    They are as long as each other and hold a number twice in some row, which no list of names does.
    """
    rows = [row for row in dataset[columns[0]] if row is not None] if len(columns) == 1 else []
    if not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) > 1 for row in rows):
        return None
    zero_one = all(item in (0, 1) and not isinstance(item, str) for row in rows for item in row)
    return len(rows[0]) if zero_one and any(len(set(row)) < len(row) for row in rows) else None


def read_sets(dataset: Dataset, columns: tuple[str, ...], hot: int | None, split: str) -> LabelSets:
    """The labels of each row, as names, numbers, or places; a single value is a list of one."""
    if len(columns) > 1:
        return read_columns(dataset, columns, split)
    names = class_names(dataset, columns[0])
    rows = enumerate(dataset[columns[0]], 1)
    return [read_row(row, hot, names, f"{columns[0]} of row {number} of the {split} split") for number, row in rows]


def read_row(row: Any, hot: int | None, names: list[str] | None, where: str) -> list[Any] | None:
    items = row if isinstance(row, list) else [row]
    if not all(map(is_label, items)):
        return None
    if hot is not None:
        if len(items) != hot:
            raise UserError(f"the {where} holds {len(items)} numbers for {hot} labels")
        return [place for place, item in enumerate(items) if item]
    if not all(isinstance(item, str | int) for item in items):
        raise UserError(f"the {where} is {row}; give lists of names")
    return [names[item] for item in items] if names else items


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """Those of a ClassLabel, also of one in a list."""
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def read_columns(dataset: Dataset, columns: tuple[str, ...], split: str) -> LabelSets:
    """The names of the columns that hold a 1. Raises UserError for anything but 0 and 1."""
    values = {column: dataset[column][:] for column in columns}
    for column, cells in values.items():
        for number, cell in enumerate(cells, 1):
            if is_label(cell) and (isinstance(cell, str) or cell not in (0, 1)):
                raise UserError(
                    f"--label_columns {column}: row {number} of the {split} split holds {cell!r}; these columns hold 0 or 1"
                )
    rows = zip(*values.values(), strict=True)
    return [
        [c for c, cell in zip(columns, row, strict=True) if cell] if all(map(is_label, row)) else None for row in rows
    ]


def name_labels(
    splits: dict[str, Dataset], sets: dict[str, LabelSets], columns: tuple[str, ...], hot: int | None
) -> tuple[list[Any], list[str]]:
    """The different labels in their order, and their names; of train where there is one."""
    if len(columns) > 1:
        return list(columns), list(columns)
    classes = class_names(next(iter(splits.values())), columns[0])
    if classes is not None:
        return classes, classes
    if hot is not None:
        return list(range(hot)), [str(place) for place in range(hot)]
    known = [sets["train"]] if "train" in sets else list(sets.values())
    values = sort_values({label for given in known for labels in given for label in labels or []}, columns[0])
    if len(values) > max(50, sum(map(len, known))):
        raise UserError(f"--label_column {columns[0]} has {len(values)} different labels; is it the label?")
    return values, [str(value) for value in values]


def check_sets(given: LabelSets, known: dict[Any, int], split: str, column: str) -> None:
    """Raise UserError for a label that is not among the known ones."""
    for row, labels in enumerate(given, 1):
        strange = [label for label in labels or [] if label not in known]
        if strange:
            names = ", ".join(map(str, list(known)[:20]))
            raise UserError(
                f"row {row} of the {split} split has the {column} {strange[0]!r}, which is not among {names}"
            )


def multi_hot(labels: list[Any] | None, numbers: dict[Any, int]) -> list[float]:
    row = [0.0] * len(numbers)
    for label in labels or []:
        row[numbers[label]] = 1.0
    return row
