"""Data sets with labels, and what the program makes of these: targets, or the words of a refusal."""

from typing import Any

import pytest
from datasets import Dataset, Features, Value

from lib.data.labels.problem_types import encode_targets, find_problem
from lib.errors import UserError

Encoded = tuple[dict[str, list[Any]], list[str], str, tuple[str, ...]]


def split(labels: list[Any], feature: Any = None, **columns: list[Any]) -> Dataset:
    rows = {"text": [f"text {row}" for row in range(len(labels))], "label": labels, **columns}
    features = Features({"text": Value("string"), "label": feature}) if feature is not None else None
    return Dataset.from_dict(rows, features=features)


def encode(
    wanted: str = "auto",
    columns: tuple[str, ...] = ("label",),
    names: list[str] | None = None,
    model: str | None = None,
    order: tuple[str, ...] = (),
    **splits: Dataset,
) -> Encoded:
    """(labels of each split, names, problem type, notes)"""
    problem, found = find_problem(splits, columns, wanted, model, names or order)
    targets = encode_targets(splits, columns, problem, names, order)
    labels = {split: values.tolist() for split, values in targets.labels.items()}
    return labels, targets.names, problem, found + targets.notes


def refusal(*arguments: Any, **splits: Any) -> str:
    with pytest.raises(UserError) as refused:
        encode(*arguments, **splits)
    return str(refused.value)
