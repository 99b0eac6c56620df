"""Regression: every way to write a number gives the same target, and what is no float32 number is refused with its row."""

from typing import Any

import pytest

from lib.config.sections import REGRESSION
from tests.data.labels import encode, refusal, split


def test_regression_targets_are_the_stored_numbers() -> None:
    labels, names, problem, notes = encode(train=split([0.0, 5.0, -1.0, 2.25]), validation=split([1, 2]))
    assert labels == {"train": [0.0, 5.0, -1.0, 2.25], "validation": [1.0, 2.0]}
    assert (names, problem, len(notes)) == (["label"], REGRESSION, 1)


@pytest.mark.parametrize("hidden", [[-1.0, -1.0], [None, None], [float("nan")] * 2])
def test_test_split_with_hidden_numbers_is_left_out(hidden: list[Any]) -> None:
    labels, _, _, notes = encode(train=split([0.5, -1.0]), test=split(hidden))
    assert list(labels) == ["train"]
    assert "test split has no labels" in notes[-1]


def test_lone_test_split_with_hidden_numbers_is_refused() -> None:
    assert "2 of 2 rows of the test split have no label" in refusal(
        names=["x"], model=REGRESSION, test=split([-1.0, -1.0])
    )


def test_labels_that_are_not_numbers_are_refused_with_their_row() -> None:
    assert "holds text such as 'good' (row 1 of the train split)" in refusal("regression", train=split(["good", "bad"]))
    assert "holds lists (row 1)" in refusal("regression", train=split([[1.0], [2.0]]))
    assert "rows 2;" in refusal(train=split([0.5, None, 1.0]))
    assert "holds one value only, 0.5" in refusal(train=split([0.5, 0.5]))


@pytest.mark.parametrize("labels", [["0.5", "1e-3", "-2"], [" 0.5", "+.001", "-2.0 "], [0.5, 0.001, -2.0]])
def test_text_and_numbers_give_the_same_targets(labels: list[Any]) -> None:
    assert encode("regression", train=split(labels))[0]["train"] == pytest.approx([0.5, 0.001, -2.0])


@pytest.mark.parametrize("text", ["1_000", "0x10", "nan", "1,5", "５", "high", "1 2"])
def test_text_that_is_no_number_is_refused_with_its_row(text: str) -> None:
    message = refusal("regression", train=split(["1", text]))
    assert repr(text) in message
    assert "row 2 of the train split" in message


@pytest.mark.parametrize("number", [1e39, -3.5e38, 1e-60, float("inf"), "1e400", "1E-50"])
def test_number_outside_float32_is_refused_with_its_row(number: Any) -> None:
    message = refusal("regression", train=split([type(number)(1), number]))
    assert "row 2 of the train split" in message
    assert "float32" in message


def test_numbers_that_float32_makes_equal_are_one_value() -> None:
    assert "one value only" in refusal("regression", train=split([16777216, 16777217]))
    notes = encode("regression", train=split([16777216, 16777217, 5, 6]))[3]
    assert any("3 of the 4 different values" in note for note in notes)


@pytest.mark.parametrize("hidden", [["-1", "-1"], ["-1.0", "-1.0"], ["", ""], [None, None]])
def test_test_split_with_hidden_numbers_as_text_is_left_out(hidden: list[Any]) -> None:
    labels, _, _, notes = encode("regression", train=split(["0.5", "-1"]), test=split(hidden))
    assert (labels["train"], list(labels)) == ([0.5, -1.0], ["train"])
    assert "test split has no labels" in notes[0]


def test_numbers_and_a_model_with_several_outputs_are_refused() -> None:
    assert "2 outputs" in refusal(names=["LABEL_0", "LABEL_1"], test=split([0.5, 1.5]))
