"""Single-label classification: stored labels of every form become 0 to n-1 with names, or are refused by row and value."""

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lib.data.labels.single_label import encode_classes
from lib.data.labels.targets import Targets, match_model
from lib.errors import UserError

NAN = float("nan")


def split(*labels: Any, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": [f"text {row}" for row in range(len(labels))], "label": list(labels), **columns})


def named_split(names: list[str], *labels: int | str) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": [f"text {row}" for row in range(len(labels))], "label": list(labels)}, features)


def encode(model_names: list[str] | None = None, **splits: Dataset) -> Targets:
    return encode_classes(splits, "label", model_names)


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
def test_classes_are_numbered_in_sorted_order(labels: list[Any], numbers: list[int], names: list[str]) -> None:
    targets = encode(train=split(*labels))
    assert (targets.labels["train"], targets.names) == (numbers, names)


def test_class_label_keeps_its_order() -> None:
    targets = encode(train=named_split(["pos", "mid", "neg"], "neg", "pos"))
    assert (targets.labels["train"], targets.names) == ([2, 0], ["pos", "mid", "neg"])


def test_class_labels_of_splits_are_matched_by_name() -> None:
    train, validation = named_split(["neg", "pos"], "neg", "pos"), named_split(["pos", "neg"], "neg", "pos")
    targets = encode(train=train, validation=validation, test=split("pos", "neg"))
    assert targets.labels == {"train": [0, 1], "validation": [0, 1], "test": [1, 0]}
    assert targets.names == ["neg", "pos"]


def test_label_text_column_names_integer_labels() -> None:
    assert encode(train=split(3, 1, 3, label_text=["good", "bad", "good"])).names == ["bad", "good"]


@pytest.mark.parametrize("spelled", [["x", "x"], ["x", None], ["", "x"]])
def test_ambiguous_label_text_column_is_ignored(spelled: list[str | None]) -> None:
    assert encode(train=split(0, 1, label_text=spelled)).names == ["0", "1"]


def test_label_text_column_does_not_rename_string_labels() -> None:
    assert encode(train=split("a", "b", label_text=["x", "y"])).names == ["a", "b"]


def test_whole_numbers_as_floats_equal_integers() -> None:
    targets = encode(train=split(1.0, 4.0), validation=split(4, 1))
    assert targets.labels == {"train": [0, 1], "validation": [1, 0]}
    assert targets.names == ["1", "4"]


def test_column_named_labels_is_read_before_it_is_replaced() -> None:
    splits = {"train": Dataset.from_dict({"text": ["x", "y", "z"], "labels": ["b", "a", "b"]})}
    targets = encode_classes(splits, "labels")
    assert (list(targets.attach(splits)["train"]["labels"]), targets.names) == ([1, 0, 1], ["a", "b"])


# ---------------------------------------------------------------------------------------------------- missing


@pytest.mark.parametrize(
    "hidden", [split(-1, -1), split(None, None), split("", ""), split(NAN, NAN), split(-1.0, -1.0)]
)
def test_test_split_with_hidden_labels_is_left_out_with_a_note(hidden: Dataset) -> None:
    targets = encode(train=split(0, 1), test=hidden)
    assert list(targets.labels) == ["train"]
    (note,) = targets.notes
    assert "test split has no labels and is left out" in note


def test_test_split_with_hidden_class_labels_is_left_out_with_a_note() -> None:
    names = ["neg", "pos"]
    targets = encode(train=named_split(names, 0, 1), test=named_split(names, -1, -1))
    assert list(targets.labels) == ["train"]
    assert len(targets.notes) == 1


def test_labeled_test_split_is_kept_without_a_note() -> None:
    targets = encode(train=split(0, 1), test=split(1, 0))
    assert (targets.labels["test"], targets.notes) == ([1, 0], ())


@pytest.mark.parametrize("missing", [None, ""])
def test_unlabeled_rows_are_refused_with_their_numbers(missing: str | None) -> None:
    message = refusal(train=split("a", missing, "b", missing))
    assert "2 of 4 rows of the train split have no label: rows 2, 4;" in message


def test_nan_labels_are_refused_with_their_row() -> None:
    assert "1 of 3 rows of the validation split have no label: rows 3;" in refusal(
        train=split(0, 1), validation=split(1.0, 0.0, NAN)
    )


def test_first_five_of_many_unlabeled_rows_are_listed() -> None:
    assert "20 of 21 rows of the train split have no label: rows 2, 3, 4, 5, 6, ...;" in refusal(
        train=split("a", *[None] * 20)
    )


def test_partly_labeled_test_split_is_refused() -> None:
    assert "1 of 2 rows of the test split have no label: rows 2" in refusal(train=split(0, 1), test=split(1, -1))


def test_minus_one_as_a_class_is_explained() -> None:
    assert "-1 stands for a hidden label" in refusal(train=split(-1, 0, 1))
    assert "-1" not in refusal(train=split(None, 0, 1))


def test_lone_test_split_without_labels_is_refused() -> None:
    assert "2 of 2 rows of the test split have no label" in refusal(["a", "b"], test=split(None, None))


# ---------------------------------------------------------------------------------------------------- refused


def test_label_that_train_lacks_is_refused_with_its_row() -> None:
    message = refusal(train=split("bad", "good"), validation=split("good", "great", "bad", "fine"))
    assert "2 rows of the validation split" in message
    assert "(bad, good)" in message
    assert "row 2 with 'great'" in message


def test_unknown_label_is_refused_with_the_names_of_a_class_label() -> None:
    message = refusal(train=named_split(["neg", "pos"], 0, 1), test=split("pos", "none"))
    assert "(neg, pos)" in message
    assert "row 2 with 'none'" in message


@pytest.mark.parametrize("train", [split("a", "a"), split(1, 1), named_split(["a", "b"], "a", "a")])
def test_single_class_is_refused(train: Dataset) -> None:
    assert "--label_column label holds one class only" in refusal(train=train)


@pytest.mark.parametrize(("number", "shown"), [(0.5, "0.5"), (float("inf"), "inf")])
def test_real_numbers_are_refused_with_an_example(number: float, shown: str) -> None:
    message = refusal(train=split(1.0, number))
    assert f"--label_column label holds real numbers such as {shown}" in message
    assert "--problem_type regression" in message


@pytest.mark.parametrize("labels", [([0, 1], [1]), ({"x": 1}, {"x": 2})])
def test_lists_of_labels_are_refused(labels: tuple[Any, Any]) -> None:
    assert "--label_column label holds lists" in refusal(train=split(*labels))


def test_text_column_as_label_is_refused() -> None:
    message = refusal(train=split(*(f"review {row}" for row in range(60))))
    assert "--label_column label has 60 different values in 60 rows; is it the label?" in message


def test_mixed_text_and_numbers_are_refused() -> None:
    message = refusal(["a", "b"], validation=split("a", "b"), test=split(0, 1))
    assert "--label_column label holds text and numbers, such as" in message


# ---------------------------------------------------------------------------------------------------- a model's classes


def test_labels_follow_the_order_of_the_model() -> None:
    targets = encode(["pos", "neg"], test=split("neg", "pos"))
    assert (targets.labels["test"], targets.names) == ([1, 0], ["pos", "neg"])


def test_labels_match_the_model_in_any_case_and_keep_its_names() -> None:
    targets = encode(["POSITIVE", "NEGATIVE"], test=split("Negative", "positive"))
    assert (targets.labels["test"], targets.names) == ([1, 0], ["POSITIVE", "NEGATIVE"])


def test_names_that_differ_only_in_case_are_different_classes() -> None:
    assert encode(["a", "A", "b"], test=split("A", "a", "b")).labels["test"] == [1, 0, 2]


def test_two_classes_that_match_one_of_the_model_are_refused() -> None:
    with pytest.raises(UserError, match="are not those of the data"):
        match_model(["a", "A"], ["a", "A"], ["A", "b"])


def test_split_may_lack_classes_of_the_model() -> None:
    targets = encode(["neg", "mid", "pos"], test=split("pos", "pos"))
    assert (targets.labels["test"], targets.names) == ([2, 2], ["neg", "mid", "pos"])


def test_model_without_class_names_is_matched_by_number() -> None:
    targets = encode(["LABEL_0", "LABEL_1"], test=named_split(["neg", "pos"], "pos", "neg"))
    assert (targets.labels["test"], targets.names) == ([1, 0], ["neg", "pos"])


@pytest.mark.parametrize("model_names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["good", "bad"], ["neg", "bad"]])
def test_classes_that_the_model_lacks_are_refused(model_names: list[str]) -> None:
    message = refusal(model_names, test=split("neg", "pos"))
    assert f"the model's classes ({', '.join(model_names)}) are not those of the data (neg, pos)" in message
