"""Targets: encoded labels as Arrow arrays."""

import numpy as np
import pytest
from datasets import Features, List, Value

from lib.data.labels.targets import as_arrow, feature_of


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        (np.array([2, 0, 1]), Value("int64")),
        (np.array([0.5, -1.0, 2.0], dtype=np.float32), Value("float32")),
        (np.array([[1, 0], [0, 0], [1, 1]], dtype=np.float32), List(Value("float32"))),
    ],
)
def test_labels_become_arrow_arrays_of_their_own_type(labels: np.ndarray, feature: object) -> None:
    column = as_arrow(labels)
    assert feature_of(labels) == feature
    assert column.to_pylist() == labels.tolist()
    assert column.type == Features({"labels": feature}).arrow_schema.field("labels").type
