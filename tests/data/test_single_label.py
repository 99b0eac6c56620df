"""Labels: whatever a data set calls its classes, they become 0..n-1 with names, or are refused by row and label."""

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lib.data.labels.single_label import encode_labels, label_counts, match_model
from lib.errors import UserError

NAN = float("nan")


def split(*labels: Any, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": [f"text {row}" for row in range(len(labels))], "label": list(labels), **columns})


def named_split(names: list[str], *labels: int | str) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": [f"text {row}" for row in range(len(labels))], "label": list(labels)}, features)


def encode(
    model_names: list[str] | None = None, **splits: Dataset
) -> tuple[dict[str, list[int]], list[str], list[str]]:
    """(class numbers of each split, class names, notes)"""
    notes: list[str] = []
    encoded, names = encode_labels(splits, "label", model_names, notes)
    return {name: list(dataset["labels"]) for name, dataset in encoded.items()}, names, notes


def refusal(model_names: list[str] | None = None, **splits: Dataset) -> str:
    with pytest.raises(UserError) as refused:
        encode(model_names, **splits)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (["pos", "neg", "mid", "neg"], [2, 1, 0, 1], ["mid", "neg", "pos"]),
        ([10, 2, 7, 2], [2, 0, 1, 0], ["2", "7", "10"]),
        ([1.0, 0.0, 1.0], [1, 0, 1], ["0", "1"]),
        ([True, False, True], [1, 0, 1], ["False", "True"]),
        (["None", "null", "NA"], [1, 2, 0], ["NA", "None", "null"]),
    ],
)
def test_classes_are_numbered_in_the_order_of_their_values(
    labels: list[Any], numbers: list[int], names: list[str]
) -> None:
    encoded, found, _ = encode(train=split(*labels))
    assert encoded["train"] == numbers
    assert found == names


def test_a_class_label_keeps_its_order() -> None:
    encoded, names, _ = encode(train=named_split(["pos", "mid", "neg"], "neg", "pos"))
    assert encoded["train"] == [2, 0]
    assert names == ["pos", "mid", "neg"]


def test_class_labels_of_two_splits_agree_by_name() -> None:
    train, validation = named_split(["neg", "pos"], "neg", "pos"), named_split(["pos", "neg"], "neg", "pos")
    encoded, names, _ = encode(train=train, validation=validation, test=split("pos", "neg"))
    assert encoded == {"train": [0, 1], "validation": [0, 1], "test": [1, 0]}
    assert names == ["neg", "pos"]


def test_integers_are_named_by_the_column_beside_them() -> None:
    _, names, _ = encode(train=split(3, 1, 3, label_text=["good", "bad", "good"]))
    assert names == ["bad", "good"]


@pytest.mark.parametrize("spelled", [["x", "x"], ["x", None], ["", "x"]])
def test_a_column_that_does_not_tell_the_classes_apart_names_nothing(spelled: list[str | None]) -> None:
    assert encode(train=split(0, 1, label_text=spelled))[1] == ["0", "1"]


def test_strings_are_not_renamed_by_the_column_beside_them() -> None:
    assert encode(train=split("a", "b", label_text=["x", "y"]))[1] == ["a", "b"]


def test_whole_numbers_as_floats_equal_integers() -> None:
    encoded, names, _ = encode(train=split(1.0, 4.0), validation=split(4, 1))
    assert encoded == {"train": [0, 1], "validation": [1, 0]}
    assert names == ["1", "4"]


def test_a_column_named_labels_is_read_before_it_is_replaced() -> None:
    dataset = Dataset.from_dict({"text": ["x", "y", "z"], "labels": ["b", "a", "b"]})
    encoded, names = encode_labels({"train": dataset}, "labels", None, [])
    assert (list(encoded["train"]["labels"]), names) == ([1, 0, 1], ["a", "b"])


def test_label_counts_hold_every_class() -> None:
    assert label_counts([2, 0, 2], 4) == [1, 0, 2, 0]


# ---------------------------------------------------------------------------------------------------- missing


@pytest.mark.parametrize(
    "hidden", [split(-1, -1), split(None, None), split("", ""), split(NAN, NAN), split(-1.0, -1.0)]
)
def test_a_test_split_with_hidden_labels_is_left_out_with_a_note(hidden: Dataset) -> None:
    encoded, _, notes = encode(train=split(0, 1), test=hidden)
    assert list(encoded) == ["train"]
    assert len(notes) == 1
    assert "test split has no labels and is left out" in notes[0]


def test_hidden_labels_of_a_class_label_are_seen() -> None:
    names = ["neg", "pos"]
    encoded, _, notes = encode(train=named_split(names, 0, 1), test=named_split(names, -1, -1))
    assert list(encoded) == ["train"]
    assert len(notes) == 1


def test_a_labelled_test_split_stays_without_a_note() -> None:
    encoded, _, notes = encode(train=split(0, 1), test=split(1, 0))
    assert encoded["test"] == [1, 0]
    assert notes == []


@pytest.mark.parametrize("missing", [None, ""])
def test_unlabeled_rows_are_refused_by_their_number(missing: str | None) -> None:
    message = refusal(train=split("a", missing, "b", missing))
    assert "2 of 4 rows of the train split have no label: rows 2, 4;" in message


def test_gaps_between_numbers_are_refused_by_their_row() -> None:
    assert "1 of 3 rows of the validation split have no label: rows 3;" in refusal(
        train=split(0, 1), validation=split(1.0, 0.0, NAN)
    )


def test_only_the_first_of_many_unlabeled_rows_are_listed() -> None:
    assert "20 of 21 rows of the train split have no label: rows 2, 3, 4, 5, 6, ...;" in refusal(
        train=split("a", *[None] * 20)
    )


def test_a_partly_labelled_test_split_is_refused() -> None:
    assert "1 of 2 rows of the test split have no label: rows 2" in refusal(train=split(0, 1), test=split(1, -1))


def test_minus_one_as_a_class_is_explained() -> None:
    assert "-1 stands for a hidden label" in refusal(train=split(-1, 0, 1))
    assert "-1" not in refusal(train=split(None, 0, 1))


def test_a_lone_test_split_without_labels_cannot_be_scored() -> None:
    assert "2 of 2 rows of the test split have no label" in refusal(["a", "b"], test=split(None, None))


# ---------------------------------------------------------------------------------------------------- refused


def test_a_label_that_is_not_in_train_is_refused_with_its_row() -> None:
    message = refusal(train=split("bad", "good"), validation=split("good", "great", "bad", "fine"))
    assert "2 rows of the validation split" in message
    assert "(bad, good)" in message
    assert "row 2 with 'great'" in message


def test_classes_of_a_class_label_are_listed_by_name() -> None:
    message = refusal(train=named_split(["neg", "pos"], 0, 1), test=split("pos", "none"))
    assert "(neg, pos)" in message
    assert "row 2 with 'none'" in message


@pytest.mark.parametrize("train", [split("a", "a"), split(1, 1), named_split(["a", "b"], "a", "a")])
def test_one_class_only_is_refused(train: Dataset) -> None:
    assert "--label_column label holds one class only" in refusal(train=train)


@pytest.mark.parametrize(("number", "shown"), [(0.5, "0.5"), (float("inf"), "inf")])
def test_real_numbers_are_refused_with_one_of_them(number: float, shown: str) -> None:
    message = refusal(train=split(1.0, number))
    assert f"--label_column label holds real numbers such as {shown}" in message
    assert "--problem_type regression" in message


@pytest.mark.parametrize("labels", [([0, 1], [1]), ({"x": 1}, {"x": 2})])
def test_several_labels_a_row_are_refused(labels: tuple[Any, Any]) -> None:
    assert "--label_column label holds lists: one class a row is needed" in refusal(train=split(*labels))


def test_text_as_label_is_noticed() -> None:
    message = refusal(train=split(*(f"review {row}" for row in range(60))))
    assert "--label_column label has 60 different values in 60 rows; is it the label?" in message


def test_text_and_numbers_in_one_column_are_refused() -> None:
    message = refusal(["a", "b"], validation=split("a", "b"), test=split(0, 1))
    assert "--label_column label holds text and numbers, such as" in message


# ---------------------------------------------------------------------------------------------------- a model's classes


def test_the_order_of_the_model_rules() -> None:
    encoded, names, _ = encode(["pos", "neg"], test=split("neg", "pos"))
    assert encoded["test"] == [1, 0]
    assert names == ["pos", "neg"]


def test_case_does_not_matter_and_the_names_of_the_model_stay() -> None:
    encoded, names, _ = encode(["POSITIVE", "NEGATIVE"], test=split("Negative", "positive"))
    assert encoded["test"] == [1, 0]
    assert names == ["POSITIVE", "NEGATIVE"]


def test_names_that_differ_in_case_only_stay_apart() -> None:
    encoded, _, _ = encode(["a", "A", "b"], test=split("A", "a", "b"))
    assert encoded["test"] == [1, 0, 2]


def test_classes_of_the_data_that_the_model_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(UserError, match="are not those of the data"):
        match_model(["a", "A"], ["a", "A"], ["A", "b"])


def test_a_split_may_lack_classes_of_the_model() -> None:
    encoded, names, _ = encode(["neg", "mid", "pos"], test=split("pos", "pos"))
    assert encoded["test"] == [2, 2]
    assert names == ["neg", "mid", "pos"]


def test_a_model_without_names_is_matched_by_number() -> None:
    encoded, names, _ = encode(["LABEL_0", "LABEL_1"], test=named_split(["neg", "pos"], "pos", "neg"))
    assert encoded["test"] == [1, 0]
    assert names == ["neg", "pos"]


@pytest.mark.parametrize("model_names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["good", "bad"], ["neg", "bad"]])
def test_other_classes_than_the_models_are_refused(model_names: list[str]) -> None:
    message = refusal(model_names, test=split("neg", "pos"))
    assert f"the model's classes ({', '.join(model_names)}) are not those of the data (neg, pos)" in message
