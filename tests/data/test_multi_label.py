"""Multi-label: every form of the same labels gives the same vectors, and what fits no form is refused with its row."""

import json
from typing import Any

import pytest
from datasets import ClassLabel, List

from lib.config.sections import MULTI_LABEL
from tests.data.labels import encode, refusal, split

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


PAIRS = [[1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("kind", [int, float, bool])
def test_one_hot_lists_of_two_are_labels_by_position(kind: type) -> None:
    labels, names, problem, notes = encode(train=split([list(map(kind, row)) for row in PAIRS]))
    assert (labels["train"], names, problem) == (PAIRS, ["0", "1"], MULTI_LABEL)
    assert any("by position" in note for note in notes)


def test_one_hot_lists_of_class_labels_have_their_names() -> None:
    for rows, names in ((PAIRS, ["no", "yes"]), ([[0, 1, 0], [1, 1, 0]], ["x", "y", "z"])):
        labels, found, _, _ = encode(train=split(rows, List(ClassLabel(names=names))))
        assert (labels["train"], found) == (rows, names)


def test_lists_of_class_labels_of_another_length_are_numbers_of_classes() -> None:
    labels, _, _, _ = encode(train=split([[0, 1], [1, 0], [0, 1]], List(ClassLabel(names=["x", "y", "z"]))))
    assert labels["train"] == [[1, 1, 0]] * 3


def test_one_hot_lists_of_two_are_found_in_any_split() -> None:
    labels, names, _, _ = encode(train=split([[1, 0], [0, 1], [1, 1]]), test=split(PAIRS))
    assert (labels["test"], names) == (PAIRS, ["0", "1"])
    labels, names, _, _ = encode(train=split(PAIRS), test=split([[0, 0], [1, 1]]))
    assert (labels["train"], labels["test"]) == (PAIRS, [[0, 0], [1, 1]])


def test_one_hot_lists_follow_the_number_of_a_models_labels() -> None:
    assert encode(names=["0", "1"], model=MULTI_LABEL, test=split(PAIRS))[0]["test"] == PAIRS
    assert encode(names=["0", "1", "2"], model=MULTI_LABEL, test=split([[0, 1]]))[0]["test"] == [[1, 1, 0]]
    assert "3 numbers" in refusal(names=["0", "1"], model=MULTI_LABEL, test=split([[0, 1, 1]]))


def test_lists_of_numbers_of_several_lengths_stay_lists_of_labels() -> None:
    labels, _, _, _ = encode(train=split([[0], [1], [0, 1]]), test=split([[0, 1]]))
    assert labels == {"train": [[1, 0], [0, 1], [1, 1]], "test": [[1, 1]]}


def test_row_of_another_length_among_one_hot_lists_is_refused() -> None:
    for odd in ([0, 1], []):
        assert "row 3 of the train split" in refusal(train=split([[0, 1, 0], [1, 1, 0], odd]))


ROWS = [["joy", "fear"], ["joy"], ["anger", "fear"]]
HOT = [[0, 1, 1], [0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    "written",
    [
        [repr(row) for row in ROWS],
        [json.dumps(row) for row in ROWS],
        ["['joy' 'fear']", "['joy']", "['anger' 'fear']"],  # as NumPy prints an array
        ["[joy, fear]", "[joy]", "[anger, fear]"],
        ["('joy', 'fear')", "('joy',)", "{'anger', 'fear'}"],
        *[[separator.join(row) for row in ROWS] for separator in ("|", ";", ",", "; ", " | ", "，", "、")],
        ["joy|fear|", "joy", "anger||fear"],
    ],
)
def test_lists_written_as_text_are_read(written: list[str]) -> None:
    labels, names, _, notes = encode(MULTI_LABEL, train=split(written))
    assert (labels["train"], names) == (HOT, ["anger", "fear", "joy"])
    assert any("have several labels" in note for note in notes)


@pytest.mark.parametrize(
    "written",
    [
        ["[1, 0, 0]", "[0, 1, 1]"],
        ["[1 0 0]", "[0 1 1]"],
        ["[1. 0. 0.]", "[0. 1. 1.]"],
        ["1,0,0", "0,1,1"],
        ["1|0|0", "0|1|1"],
    ],
)
def test_one_hot_lists_written_as_text_are_labels_by_position(written: list[str]) -> None:
    assert encode(MULTI_LABEL, train=split(written))[0]["train"] == [[1, 0, 0], [0, 1, 1]]


def test_numbers_of_labels_written_as_text_are_in_numeric_order() -> None:
    assert encode(MULTI_LABEL, train=split(["2,10", "1", "10"]))[1] == ["1", "2", "10"]


def test_comma_in_a_name_of_the_model_does_not_split_it() -> None:
    labels, _, _, _ = encode(
        names=["Sci-Fi, Fantasy", "Drama"], model=MULTI_LABEL, test=split(["Sci-Fi, Fantasy", "Drama"])
    )
    assert labels["test"] == [[1, 0], [0, 1]]


def test_text_without_several_labels_is_in_the_notes() -> None:
    assert any("one label each" in note for note in encode(MULTI_LABEL, train=split(["a b", "c d"]))[3])


@pytest.mark.parametrize("labels", [[["joy"], ["joy", " "]], [["joy"], ["fear", "\u200b"]]])
def test_blank_label_in_a_list_is_refused_with_its_row(labels: list[Any]) -> None:
    assert "row 2 of the train split has a blank label" in refusal(train=split(labels))


@pytest.mark.parametrize("labels", [[[0.3, 0.7], [0.5, 0.5]], [[["a"]], [["b"]]], [{"a": 1}, {"a": 0}]])
def test_lists_of_other_things_are_refused(labels: list[Any]) -> None:
    assert "give lists of names" in refusal(MULTI_LABEL, train=split(labels))


@pytest.mark.parametrize("text", ["['a', 'b'", "['a', [", '[null, "a"', "{'a': 1}", "('a', 'b'", "['a',, 'b']"])
def test_text_that_begins_as_a_list_and_is_none_is_refused_with_its_row(text: str) -> None:
    message = refusal(MULTI_LABEL, train=split(["['a', 'b']", text]))
    assert "row 2 of the train split" in message
    assert "no list" in message


def test_label_order_is_the_order_of_the_outputs() -> None:
    labels, names, _, _ = encode(order=("b", "a"), train=split([["a"], ["b"], ["a", "b"]]))
    assert (labels["train"], names) == ([[0, 1], [1, 0], [1, 1]], ["b", "a"])
    columns = split(["x"] * 2, a=[1, 0], b=[0, 1])
    assert encode("auto", ("a", "b"), None, None, ("b", "a"), train=columns)[0]["train"] == [[0, 1], [1, 0]]


@pytest.mark.parametrize("cells", [["1", "0"], ["1.0", "0.0"], ["True", "false"], [1.0, 0.0]])
def test_columns_of_zero_and_one_may_be_text(cells: list[Any]) -> None:
    data = split(["x"] * 2, a=cells, b=cells[::-1])
    assert encode("auto", ("a", "b"), train=data)[0]["train"] == [[1, 0], [0, 1]]


def test_labels_that_look_alike_are_in_the_notes_with_their_rows() -> None:
    notes = encode(train=split([["joy", "Joy"], ["joy"], ["fear"]]))[3]
    assert any("'joy' (2 rows)" in note and "'Joy' (1 rows)" in note for note in notes)
