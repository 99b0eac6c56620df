"""Multi-label classification: from lists of names or numbers, from multi-hot lists, or from a 0/1 column for each label."""

from typing import Any

from datasets import ClassLabel, Dataset, List, Value

from lib.data.labels.targets import Targets, check_labeled, is_label, leave_out_hidden, match_model, sort_values
from lib.errors import UserError

LabelSets = list[list[Any] | None]
"""The labels of each row; None where it is unlabeled."""


def encode_label_sets(
    splits: dict[str, Dataset], columns: tuple[str, ...], model_names: list[str] | None = None
) -> Targets:
    """Multi-hot vectors: 0.0 or 1.0 for each label, float32. A row may have no label at all.

    Names come from a ClassLabel, from the lists themselves, or are those of the columns. With `model_names`, labels and
    their order are those of an existing model. A test split without any label is left out.

    Raises UserError for unlabeled rows, labels that are not in train, and fewer than two labels.
    """
    column = " ".join(columns)
    width = multi_hot_width(splits.get("train", next(iter(splits.values()))), columns)
    sets, notes = leave_out_hidden(
        {split: read_label_sets(dataset, columns, width, split) for split, dataset in splits.items()}
    )
    for split, given in sets.items():
        check_labeled(given, split, column)
    values, names = name_labels(splits, sets, columns, width)
    if model_names is not None:
        values, names = match_model(values, names, model_names)
        lacking = [name for name, value in zip(names, values, strict=True) if not isinstance(value, str | int | bool)]
        if len(columns) > 1 and lacking:
            raise UserError(
                f"--label_columns {column}: the model also has the labels {', '.join(lacking)}; name them all"
            )
    if len(values) < 2:
        raise UserError(
            f"--label_column {column} has {len(values)} label only, but multi-label classification needs at least two; "
            "use single-label classification with two classes"
        )
    numbers = {value: number for number, value in enumerate(values)}
    encoded = {}
    for split, given in sets.items():
        encoded[split] = [[0.0] * len(numbers) for _ in given]
        for row, labels in enumerate(given):
            for label in labels or []:
                if label not in numbers:
                    raise UserError(
                        f"row {row + 1} of the {split} split has the {column} {label!r}, which is not among "
                        f"{', '.join(map(str, list(numbers)[:20]))}"
                    )
                encoded[split][row][numbers[label]] = 1.0
    if "train" in encoded:
        cells = zip(*encoded["train"], strict=True)
        unused = [name for name, values in zip(names, cells, strict=True) if not any(values)]
        notes += (f"warning: no train row has the label {', '.join(unused)}",) if unused else ()
    return Targets(encoded, List(Value("float32")), names, notes)


def multi_hot_width(dataset: Dataset, columns: tuple[str, ...]) -> int | None:
    """The length of multi-hot lists; None where the lists hold the labels themselves.

    Multi-hot lists all have one length, hold only 0 and 1, and some row repeats a number, which lists of labels never do.
    """
    rows = [row for row in dataset[columns[0]] if row is not None] if len(columns) == 1 else []
    if not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) > 1 for row in rows):
        return None
    zero_one = all(item in (0, 1) and not isinstance(item, str) for row in rows for item in row)
    return len(rows[0]) if zero_one and any(len(set(row)) < len(row) for row in rows) else None


def read_label_sets(dataset: Dataset, columns: tuple[str, ...], width: int | None, split: str) -> LabelSets:
    """The labels of each row, as names, numbers, or positions in a multi-hot list; a single value is a list of one.

    Raises UserError with the row for a list of another length, a value that is no label, and a column of other than 0 and 1.
    """
    if len(columns) > 1:
        cells = {column: dataset[column][:] for column in columns}
        for column, values in cells.items():
            for number, cell in enumerate(values, 1):
                if is_label(cell) and (isinstance(cell, str) or cell not in (0, 1)):
                    raise UserError(
                        f"--label_columns {column}: row {number} of the {split} split holds {cell!r}; "
                        "these columns hold 0 or 1"
                    )
        return [
            [column for column, cell in zip(columns, row, strict=True) if cell] if all(map(is_label, row)) else None
            for row in zip(*cells.values(), strict=True)
        ]
    names = class_names(dataset, columns[0])
    sets: LabelSets = []
    for number, row in enumerate(dataset[columns[0]], 1):
        items = row if isinstance(row, list) else [row]
        where = f"the {columns[0]} of row {number} of the {split} split"
        if not all(map(is_label, items)):
            sets.append(None)
        elif width is not None:
            if len(items) != width:
                raise UserError(f"{where} holds {len(items)} numbers for {width} labels")
            sets.append([place for place, item in enumerate(items) if item])
        elif not all(isinstance(item, str | int) for item in items):
            raise UserError(f"{where} is {row}; give lists of names")
        else:
            sets.append([names[item] for item in items] if names else items)
    return sets


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """The names of a ClassLabel, or of a list of them."""
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def name_labels(
    splits: dict[str, Dataset], sets: dict[str, LabelSets], columns: tuple[str, ...], width: int | None
) -> tuple[list[Any], list[str]]:
    """The distinct labels in order, and their names; those of train if there is a train split."""
    if len(columns) > 1:
        return list(columns), list(columns)
    classes = class_names(next(iter(splits.values())), columns[0])
    if classes is not None:
        return classes, classes
    if width is not None:
        return list(range(width)), [str(place) for place in range(width)]
    known = [sets["train"]] if "train" in sets else list(sets.values())
    values = sort_values({label for given in known for labels in given for label in labels or []}, columns[0])
    if len(values) > max(50, sum(map(len, known))):
        raise UserError(f"--label_column {columns[0]} has {len(values)} different labels; is it the label?")
    return values, [str(value) for value in values]
