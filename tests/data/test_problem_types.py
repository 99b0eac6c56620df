"""Problem types: what the labels look like decides, and what may be of two kinds is refused with the flag that decides."""

import re
from typing import Any

import pytest
from datasets import ClassLabel

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.data.labels.problem_types import summarize_labels
from tests.data.labels import encode, refusal, split


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


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["0.50", "3.25"], REGRESSION),  # equal decimals
        (["0.5", "3.25", "1"], REGRESSION),  # none that end with 0
        (["1.0", "2.25", "-3.5"], REGRESSION),  # as Python and pandas write them
        (["1e-05", "0.25"], REGRESSION),
        (["0", "1", "10"], CLASSIFICATION),
        (["1.0", "2.0"], CLASSIFICATION),
        (["0111", "0112", "2011"], CLASSIFICATION),
        (["1E1", "10", "2E3"], CLASSIFICATION),
        (["true", "false"], CLASSIFICATION),
        (["250.00", "V70", "A1", "B2"], CLASSIFICATION),
        (["['joy', 'fear']", "['joy']", "[]"], MULTI_LABEL),
        (["[1, 0, 0]", "[0, 1, 1]"], MULTI_LABEL),
        (["[spam]", "[ham]"], CLASSIFICATION),
        (["Sci-Fi, Fantasy", "Drama", "Comedy"], CLASSIFICATION),
    ],
)
def test_problem_type_is_found_from_text_in_any_form(labels: list[str], problem: str) -> None:
    assert encode(train=split(labels))[2] == problem


@pytest.mark.parametrize("labels", [["0.5", "1.25"], [0.5, 1.25], ["1.0", "2.0"], [1.0, 2.0], ["['a']", "['b']"]])
def test_choice_that_could_be_another_is_in_the_notes(labels: list[Any]) -> None:
    assert any("--problem_type" in note for note in encode(train=split(labels))[3])


def test_plain_classes_need_no_note() -> None:
    for labels in (["a", "b"], ["0", "1"], [0, 1], [True, False]):
        assert encode(train=split(labels))[3] == ()


@pytest.mark.parametrize(
    ("labels", "odd", "row"),
    [
        (["1.1", "1.10", "1.2"], "1.10", 2),
        (["0.5", "2.25", "n/a"], "n/a", 3),
        (["0.5", "inf"], "inf", 2),
        (["joy|fear", "joy", "fear"], "joy|fear", 1),
        (["joy", "joy;fear", "fear"], "joy;fear", 2),
        (["2", "2,5", "5"], "2,5", 2),
        (["1,0", "0,1"], "1,0", 1),
        (["['a', 'b']", "['a']", "b"], "['a', 'b']", 1),
    ],
)
def test_text_that_may_be_of_two_kinds_is_refused_with_its_row_and_the_flag(
    labels: list[str], odd: str, row: int
) -> None:
    message = refusal(train=split(labels))
    assert f"row {row}" in message
    assert repr(odd) in message
    assert "--problem_type" in message


def test_problem_type_settles_text_that_may_be_of_two_kinds() -> None:
    sections, several = split(["1.1", "1.10", "1.2"]), split(["joy|fear", "joy", "fear"])
    assert encode(CLASSIFICATION, train=sections)[1] == ["1.1", "1.10", "1.2"]
    assert encode(REGRESSION, train=sections)[0]["train"] == pytest.approx([1.1, 1.1, 1.2])
    assert encode(CLASSIFICATION, train=several)[1] == ["fear", "joy", "joy|fear"]
    assert encode(MULTI_LABEL, train=several)[1] == ["fear", "joy"]


def test_names_of_a_model_settle_text_that_may_be_of_two_kinds() -> None:
    names = ["1.1", "1.10", "1.2"]
    assert encode(names=names, test=split(["1.10", "1.2"]))[0]["test"] == [1, 2]
    assert encode(order=("joy|fear", "fear", "joy"), train=split(["joy", "fear", "joy|fear"]))[0]["train"] == [2, 1, 0]


def test_numbers_in_train_and_other_text_in_another_split_are_refused() -> None:
    train = split(["0.5", "1.25", "3.5"])
    assert "row 2 of the validation split has the label 'high'" in refusal(train=train, validation=split(["1", "high"]))
    assert "row 1 of the validation split has the label '2.50'" in refusal(train=train, validation=split(["2.50"]))


def test_hidden_labels_of_test_do_not_decide_the_problem_type() -> None:
    for hidden in (["-1", "-1"], ["", ""], [-1, -1]):
        assert encode(train=split(["0.5", "1.25"]), test=split(hidden))[2] == REGRESSION
        assert encode(train=split(["a", "b"]), test=split(hidden))[2] == CLASSIFICATION


def test_label_order_is_for_classes() -> None:
    assert "--label_order" in refusal("auto", ("label",), None, None, ("1", "2"), train=split([0.5, 1.5]))


def test_label_summary_counts_every_class_or_gives_the_range() -> None:
    assert summarize_labels([[1, 0], [1, 1]], ["a", "b"], MULTI_LABEL) == "a 2, b 1 (multi-label)"
    assert summarize_labels([0.5, -1.0, 2.0], ["stars"], REGRESSION) == "stars, from -1 to 2, mean 0.5"
    assert summarize_labels([0, 1, 1], ["x", "y", "z"], CLASSIFICATION) == "x 1, y 2, z 0"


def test_splits_may_write_numbers_with_different_decimals() -> None:
    train = split(["0.00", "0.14", "1.50"])
    assert encode(train=train, validation=split(["0.5", "2.25"]))[2] == REGRESSION
    message = refusal(train=train, validation=split(["1.1", "1.10"]))
    assert re.search(r"row 2 of the validation split.*1\.10.*--problem_type", message)
