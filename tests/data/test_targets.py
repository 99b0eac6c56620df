"""Targets: the column `labels` that is attached to the labeled splits."""

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

from lib.data.labels.targets import Targets


def rows(count: int) -> Dataset:
    return Dataset.from_dict({"text": [f"text {row}" for row in range(count)], "labels": ["old"] * count})


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        (np.array([2, 0, 1]), Value("int64")),
        (np.array([0.5, -1.0, 2.0], dtype=np.float32), Value("float32")),
        (np.array([[1, 0], [0, 0], [1, 1]], dtype=np.float32), List(Value("float32"))),
    ],
)
def test_labels_replace_the_stored_column_in_their_own_type(labels: np.ndarray, feature: object) -> None:
    attached = Targets({"train": labels}, feature, ["a", "b", "c"]).attach({"train": rows(3), "test": rows(2)})
    assert list(attached) == ["train"]
    assert attached["train"]["labels"][:] == labels.tolist()
    assert attached["train"].features == Features({"text": Value("string"), "labels": feature})


def test_other_labels_of_the_same_rows_have_another_fingerprint() -> None:
    def fingerprint(*labels: int) -> str:
        targets = Targets({"train": np.array(labels)}, Value("int64"), ["a", "b"])
        return targets.attach({"train": rows(2)})["train"]._fingerprint

    assert fingerprint(0, 1) == fingerprint(0, 1)
    assert fingerprint(0, 1) != fingerprint(1, 0)
