"""Targets: stored labels decide the problem type, and every form of the same labels gives the same targets."""

from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.data.labels.problem_types import encode_targets, find_problem, summarize_labels
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
    **splits: Dataset,
) -> Encoded:
    """(labels of each split, names, problem type, notes)"""
    problem = find_problem(splits, columns, wanted, model)
    targets = encode_targets(splits, columns, problem, names)
    labels = {split: dataset["labels"][:] for split, dataset in targets.attach(splits).items()}
    return labels, targets.names, problem, targets.notes


def refusal(*arguments: Any, **splits: Any) -> str:
    with pytest.raises(UserError) as refused:
        encode(*arguments, **splits)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------- problem type


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["a", "b"], CLASSIFICATION),
        ([0, 1, 5], CLASSIFICATION),
        ([1.0, 2.0], CLASSIFICATION),
        ([1.0, 2.5], REGRESSION),
        ([["a"], ["a", "b"]], MULTI_LABEL),
        ([[0], [1, 3]], MULTI_LABEL),
        ([[0, 1, 0], [1, 1, 0]], MULTI_LABEL),
    ],
)
def test_problem_type_is_found_from_the_labels_of_train(labels: list[Any], problem: str) -> None:
    assert encode(train=split(labels))[2] == problem


def test_labels_of_test_do_not_decide_the_problem_type() -> None:
    assert "real numbers such as 0.5" in refusal(train=split([0, 1]), test=split([0.5, 1.0]))


def test_problem_type_regression_reads_integers_and_class_labels_as_numbers() -> None:
    for dataset in (split([3, 1, 2]), split([3, 1, 2], ClassLabel(names=list("abcd")))):
        labels, names, problem, _ = encode("regression", train=dataset)
        assert (labels["train"], names, problem) == ([3.0, 1.0, 2.0], ["label"], REGRESSION)


def test_problem_type_is_that_of_an_existing_model() -> None:
    labels, names, problem, _ = encode(names=["stars"], model=REGRESSION, test=split([1, 4, 4]))
    assert (labels["test"], names, problem) == ([1.0, 4.0, 4.0], ["stars"], REGRESSION)
    assert "the model is for regression" in refusal(
        "single_label_classification", names=["x"], model=REGRESSION, test=split([1])
    )


def test_label_columns_are_for_multi_label_only() -> None:
    data = split([0, 1], other=[1, 0])
    assert "--label_columns label other: regression has one column" in refusal(
        "regression", ("label", "other"), train=data
    )


# ---------------------------------------------------------------------------------------------------- regression


def test_regression_targets_are_the_stored_numbers() -> None:
    labels, names, problem, notes = encode(train=split([0.0, 5.0, -1.0, 2.25]), validation=split([1, 2]))
    assert labels == {"train": [0.0, 5.0, -1.0, 2.25], "validation": [1.0, 2.0]}
    assert (names, problem, notes) == (["label"], REGRESSION, ())


@pytest.mark.parametrize("hidden", [[-1.0, -1.0], [None, None], [float("nan")] * 2])
def test_test_split_with_hidden_numbers_is_left_out(hidden: list[Any]) -> None:
    labels, _, _, notes = encode(train=split([0.5, -1.0]), test=split(hidden))
    assert list(labels) == ["train"]
    assert "test split has no labels" in notes[0]


def test_lone_test_split_with_hidden_numbers_is_refused() -> None:
    assert "2 of 2 rows of the test split have no label" in refusal(
        names=["x"], model=REGRESSION, test=split([-1.0, -1.0])
    )


def test_labels_that_are_not_numbers_are_refused_with_their_row() -> None:
    assert "holds text such as 'good' (row 1)" in refusal("regression", train=split(["good", "bad"]))
    assert "holds lists (row 1)" in refusal("regression", train=split([[1.0], [2.0]]))
    assert "rows 2;" in refusal(train=split([0.5, None, 1.0]))
    assert "holds one value only, 0.5" in refusal(train=split([0.5, 0.5]))


# ---------------------------------------------------------------------------------------------------- multi-label

WANTED = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
NAMES = ["a", "b", "c"]


def named(rows: list[list[float]]) -> list[list[str]]:
    return [[name for name, value in zip(NAMES, row, strict=True) if value] for row in rows]


@pytest.mark.parametrize("form", ["names", "names in any order", "class label", "columns", "columns of bools"])
def test_every_form_of_the_same_labels_gives_the_same_targets(form: str) -> None:
    numbers = [[place for place, value in enumerate(row) if value] for row in WANTED]
    columns = {name: [int(row[place]) for row in WANTED] for place, name in enumerate(NAMES)}
    datasets = {
        "names": split(named(WANTED)),
        "names in any order": split([row[::-1] for row in named(WANTED)]),
        "class label": split(numbers, List(ClassLabel(names=NAMES))),
        "columns": split(["x"] * 4, **columns),
        "columns of bools": split(["x"] * 4, **{name: list(map(bool, cells)) for name, cells in columns.items()}),
    }
    chosen = tuple(NAMES) if form.startswith("columns") else ("label",)
    labels, names, problem, _ = encode("auto", chosen, train=datasets[form])
    assert (labels["train"], names, problem) == (WANTED, NAMES, MULTI_LABEL)


@pytest.mark.parametrize("kind", [int, float, bool])
def test_multi_hot_lists_are_labels_by_position(kind: type) -> None:
    labels, names, _, _ = encode(train=split([list(map(kind, row)) for row in WANTED]))
    assert (labels["train"], names) == (WANTED, ["0", "1", "2"])


def test_lists_of_numbers_are_labels_named_by_the_numbers() -> None:
    labels, names, _, _ = encode(train=split([[7], [0, 7], [], [3]]))
    assert names == ["0", "3", "7"]
    assert labels["train"] == [[0, 0, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_one_class_in_each_row_can_be_multi_label() -> None:
    labels, names, _, _ = encode("multi_label_classification", train=split(["x", "y", "x"]))
    assert (labels["train"], names) == ([[1, 0], [0, 1], [1, 0]], ["x", "y"])


@pytest.mark.parametrize("hidden", [[None, None], [[], []], [[-1], [-1]]])
def test_test_split_without_any_label_is_left_out(hidden: list[Any]) -> None:
    labels, _, _, notes = encode(train=split([[0], [1]]), test=split(hidden))
    assert list(labels) == ["train"]
    assert "test split has no labels" in notes[0]


def test_rows_and_labels_that_do_not_fit_are_refused_with_their_numbers() -> None:
    assert "1 of 3 rows of the train split have no label: rows 2" in refusal(train=split([["a"], None, ["b"]]))
    assert "row 2 of the validation split has the label 'c', which is not among a, b" in refusal(
        train=split([["a"], ["b"]]), validation=split([["a"], ["b", "c"]])
    )
    assert "--label_columns b: row 2 of the train split holds 2; these columns hold 0 or 1" in refusal(
        "auto", ("a", "b"), train=split(["x"] * 2, a=[0, 1], b=[1, 2])
    )
    assert "1 label only" in refusal(train=split([["a"], []]))
    assert "holds 2 numbers for 3 labels" in refusal(train=split([[0, 1, 1]] * 2), validation=split([[0, 1]]))
    assert "1 of 2 rows of the train split have no a b: rows 2" in refusal(
        "auto", ("a", "b"), train=split(["x"] * 2, a=[0, None], b=[1, 1])
    )


def test_label_that_train_lacks_is_in_the_notes() -> None:
    _, names, _, notes = encode("auto", ("a", "b"), train=split(["x"] * 2, a=[0, 1], b=[0, 0]))
    assert (names, notes) == (["a", "b"], ("warning: no train row has the label b",))


def test_labels_follow_the_order_of_the_model_and_need_all_its_columns() -> None:
    labels, names, _, _ = encode(names=["b", "a", "z"], model=MULTI_LABEL, test=split([["a"], ["a", "b"]]))
    assert (labels["test"], names) == ([[0, 1, 0], [1, 1, 0]], ["b", "a", "z"])
    columns = split(["x"] * 2, a=[0, 1], b=[1, 0])
    assert "the model also has the labels z" in refusal(
        "auto", ("a", "b"), names=["b", "a", "z"], model=MULTI_LABEL, test=columns
    )


def test_label_summary_counts_every_class_or_gives_the_range() -> None:
    assert summarize_labels(WANTED, NAMES, MULTI_LABEL) == "a 2, b 2, c 2 (multi-label)"
    assert summarize_labels([0.5, -1.0, 2.0], ["stars"], REGRESSION) == "stars, from -1 to 2, mean 0.5"
    assert summarize_labels(np.array([0, 1, 1]), ["x", "y", "z"], CLASSIFICATION) == "x 1, y 2, z 0"
