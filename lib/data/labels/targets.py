"""Targets: the column `labels` that a model learns, and the checks that all kinds of labels share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from lib.errors import UserError

Labels = list[Any]
"""One label for each row; None where it is missing."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """The encoded labels of each split, their `datasets` feature, and the names of the model's outputs.

    `notes` are sentences for the log.
    """

    labels: dict[str, Labels]
    feature: Any
    names: list[str]
    notes: tuple[str, ...] = ()

    def attach(self, splits: dict[str, Dataset]) -> dict[str, Dataset]:
        """The labeled splits with their targets as column `labels`."""
        attached = {}
        for split, labels in self.labels.items():
            dataset = splits[split]
            if "labels" in dataset.column_names:
                dataset = dataset.remove_columns("labels")
            attached[split] = dataset.add_column("labels", labels, feature=self.feature)
        return attached


def is_label(label: Any) -> bool:
    """Whether a stored value is a label: not missing, not empty, not NaN, and not -1, which stands for a hidden label."""
    return label is not None and label not in ("", -1) and label == label


def leave_out_hidden(labels: dict[str, Labels]) -> tuple[dict[str, Labels], tuple[str, ...]]:
    """`labels` without a test split that has none, and a note on it; a lone test split stays."""
    test = labels.get("test")
    if test is None or len(labels) == 1 or any(is_label(label) and label not in ([], [-1]) for label in test):
        return labels, ()
    note = "the test split has no labels and is left out; results are those on validation"
    return {split: given for split, given in labels.items() if split != "test"}, (note,)


def check_labeled(labels: Labels, split: str, column: str, hint: str = "") -> None:
    """Raise UserError, with the row numbers and `hint`, where labels are missing."""
    missing = [row for row, label in enumerate(labels, 1) if label is None]
    if missing:
        rows = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{len(missing)} of {len(labels)} rows of the {split} split have no {column}: rows {rows}; "
            f"label or remove them{hint}"
        )


def sort_values(different: set[Any], column: str) -> Labels:
    """Distinct labels in order. Raises UserError where text and numbers are mixed."""
    texts = [value for value in different if isinstance(value, str)]
    if 0 < len(texts) < len(different):
        number = next(value for value in different if not isinstance(value, str))
        raise UserError(
            f"--label_column {column} holds text and numbers, such as {texts[0]!r} and {number}; use one of them"
        )
    return sorted(different)


def match_model(values: Labels, names: list[str], model_names: Sequence[str]) -> tuple[Labels, list[str]]:
    """The labels of the data, and their names, in the order of a model's outputs.

    They are matched by name, or by number if the model's outputs have no names. An output that the data lack gets a
    value that equals no label. Raises UserError when neither matches.
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
