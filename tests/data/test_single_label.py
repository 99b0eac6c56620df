"""Single-label classification: stored labels of every form become 0 to n-1 with names, or are refused by row and value."""

import dataclasses
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lib.data.labels.names import match_model
from lib.data.labels.single_label import encode_classes
from lib.data.labels.targets import Targets
from lib.errors import UserError

NAN = float("nan")


def split(*labels: Any, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": [f"text {row}" for row in range(len(labels))], "label": list(labels), **columns})


def named_split(names: list[str], *labels: int | str) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": [f"text {row}" for row in range(len(labels))], "label": list(labels)}, features)


def encode(model_names: list[str] | None = None, order: tuple[str, ...] = (), **splits: Dataset) -> Targets:
    targets = encode_classes(splits, "label", model_names, order)
    return dataclasses.replace(targets, labels={split: labels.tolist() for split, labels in targets.labels.items()})


def refusal(model_names: list[str] | None = None, order: tuple[str, ...] = (), **splits: Dataset) -> str:
    with pytest.raises(UserError) as refused:
        encode(model_names, order, **splits)
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
        (["10", "2", "0", "-5"], [3, 2, 1, 0], ["-5", "0", "2", "10"]),
        (["0111", "2011", "0112"], [0, 2, 1], ["0111", "0112", "2011"]),
        (["1E1", "10", "2E3"], [1, 0, 2], ["10", "1E1", "2E3"]),
        (["10.0", "2.0", "2.0"], [1, 0, 0], ["2.0", "10.0"]),
        (["true", "FALSE", "+1"], [2, 1, 0], ["+1", "FALSE", "true"]),
        (["1", "other", "10"], [0, 2, 1], ["1", "10", "other"]),
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


@pytest.mark.parametrize("labels", [["0", "1", "0"], [0, 1, 0]])
def test_label_text_column_names_integers_of_all_splits(labels: list[Any]) -> None:
    train, test = split(*labels, label_text=["bad", "", "bad"]), split("1", label_text=["good"])
    assert encode(train=train, test=test).names == ["bad", "good"]


@pytest.mark.parametrize("spelled", [["x", "x", "x"], ["x", "y", "z"]])
def test_label_text_that_disagrees_with_the_labels_is_refused_with_its_row(spelled: list[str]) -> None:
    for train in (split(0, 1, 0, label_text=spelled), split("0", "1", "0", label_text=spelled)):
        message = refusal(train=train)
        assert f"row {2 if spelled[1] == 'x' else 3} of the train split" in message
        assert "label_text" in message
    assert "row 1 of the test split" in refusal(
        train=split(0, 1, label_text=["bad", "good"]), test=split(0, label_text=["good"])
    )


@pytest.mark.parametrize("spelled", [["x", None], ["", "x"]])
def test_incomplete_label_text_column_is_ignored(spelled: list[str | None]) -> None:
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
    assert (targets.labels["train"].tolist(), targets.names) == ([1, 0, 1], ["a", "b"])


@pytest.mark.parametrize(
    ("train", "other", "numbers"),
    [
        (split("0", "1", "0"), split(1, 0), [1, 0]),
        (split(0, 1, 0), split("1", "0"), [1, 0]),
        (split("True", "False", "Unknown"), split(True, False), [1, 0]),
        (split("true", "false", "unknown"), split(True, False), [1, 0]),
        (split(True, False), split(1, 0), [1, 0]),
        (split("1", "2", "other"), split(1.0, 2.0), [0, 1]),
        (named_split(["neg", "pos"], 0, 1), split("pos", "neg"), [1, 0]),
        (split("1.0", "2.0"), split("2", "1"), [1, 0]),
        (split("1", "2"), split("2.0", "1.0"), [1, 0]),
    ],
)
def test_labels_of_splits_are_matched_by_their_text_whatever_their_type(
    train: Dataset, other: Dataset, numbers: list[int]
) -> None:
    assert encode(train=train, validation=other).labels["validation"] == numbers


# ---------------------------------------------------------------------------------------------------- look-alikes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Pos", "pos"),
        ("pos", "pos "),
        ("very good", "very  good"),
        ("caf\u00e9", "cafe\u0301"),  # NFC and NFD
        ("\uff21", "A"),  # full width
        ("pos", "pos\u200b"),  # zero width
        ("a b", "a\u00a0b"),  # no-break space
        ("1", "1.0"),
    ],
)
def test_classes_that_look_alike_are_two_classes_and_in_the_notes_with_their_rows(one: str, other: str) -> None:
    targets = encode(train=split(one, other, one, "neg"))
    assert len(targets.names) == 3
    note = next(note for note in targets.notes if "look alike" in note)
    assert "(2 rows)" in note
    assert "(1 rows)" in note
    assert note.isprintable()


@pytest.mark.parametrize("other", ["pos", "Pos ", "Pos\u200b"])
def test_label_of_another_split_that_looks_like_a_class_is_refused_with_that_class(other: str) -> None:
    message = refusal(train=split("Pos", "Neg"), validation=split("Neg", other))
    assert "row 2" in message
    assert "'Pos'" in message.split("classes (Neg, Pos)")[1]


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\u200b", "\u3000", "\ufeff "])
def test_blank_labels_are_refused_with_their_row(blank: str) -> None:
    message = refusal(train=split("a", "b", blank))
    assert "row 3 of the train split has a blank label" in message
    assert message.isprintable()


def test_blank_name_of_a_class_label_is_refused() -> None:
    assert "blank name" in refusal(train=named_split(["neg", "pos", " "], 0, 1))


# ---------------------------------------------------------------------------------------------------- missing


@pytest.mark.parametrize(
    "hidden",
    [
        split("-1", "-1"),
        split("-1.0", "-1.0"),
        split(-1, -1),
        split(None, None),
        split("", ""),
        split(NAN, NAN),
        split(-1.0, -1.0),
    ],
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
    for labels in ((-1, 0, 1), ("-1", "0", "1")):
        assert "-1 stands for a hidden label" in refusal(train=split(*labels))
        assert encode(order=("-1", "0", "1"), train=split(*labels)).names == ["-1", "0", "1"]
        assert encode(["-1", "0", "1"], test=split(*labels)).labels["test"] == [0, 1, 2]
    assert encode(train=split("-1", "other")).names == ["-1", "other"]
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


def test_numbers_in_one_split_and_words_in_another_are_refused() -> None:
    assert "row 1 with '0'" in refusal(train=split("a", "b"), test=split(0, 1))


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
        match_model(["a", "A"], ["A", "b"])


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


# ---------------------------------------------------------------------------------------------------- outputs without names


@pytest.mark.parametrize("labels", [(2, 0), ("2", "0"), (2.0, 0.0)])
def test_some_of_the_integers_are_matched_with_outputs_of_that_number(labels: tuple[Any, ...]) -> None:
    for model_names in (["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"]):
        targets = encode(model_names, test=split(*labels))
        assert (targets.labels["test"], targets.names) == ([2, 0], ["0", "1", "2"])


def test_integers_beyond_the_outputs_are_refused() -> None:
    assert "are not those of the data (1, 2)" in refusal(["LABEL_0", "LABEL_1"], test=split(1, 2))


def test_text_labels_and_outputs_without_names_need_the_label_order() -> None:
    model_names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert "--label_order a b" in refusal(model_names, test=split("a", "b"))
    targets = encode(model_names, ("b", "c", "a"), test=split("a", "b"))
    assert (targets.labels["test"], targets.names) == ([2, 0], ["b", "c", "a"])
    assert encode(model_names, test=split("LABEL_2", "LABEL_0")).labels["test"] == [2, 0]


# ---------------------------------------------------------------------------------------------------- label order


def test_label_order_is_the_order_of_a_new_models_classes() -> None:
    targets = encode(order=("neg", "mid", "pos"), train=split("pos", "neg", "mid"), test=split("mid", "neg"))
    assert targets.labels == {"train": [2, 0, 1], "test": [1, 0]}
    assert targets.names == ["neg", "mid", "pos"]
    assert encode(order=("1", "0"), train=split(0, 1)).labels["train"] == [1, 0]
    assert encode(order=("y", "x"), train=named_split(["x", "y"], 0, 1)).labels["train"] == [1, 0]
    assert encode(order=("b", "a"), train=split(0, 1, label_text=["a", "b"])).names == ["b", "a"]


@pytest.mark.parametrize(("order", "word"), [(("a", "b"), "c"), (("a", "b", "c", "d"), "d"), (("a", "b", "C"), "'C'")])
def test_label_order_names_every_class_and_no_other(order: tuple[str, ...], word: str) -> None:
    message = refusal(order=order, train=split("a", "b", "c"))
    assert "--label_order" in message
    assert word in message


def test_label_order_gives_other_names_for_the_classes_of_a_model() -> None:
    targets = encode(["negative", "neutral", "positive"], ("0", "1", "2"), test=split(2, 0))
    assert (targets.labels["test"], targets.names) == ([2, 0], ["negative", "neutral", "positive"])
    assert any("0 = negative" in note for note in targets.notes)


def test_label_order_does_not_change_the_order_of_a_model() -> None:
    assert encode(["neg", "pos"], ("neg", "pos"), test=split("pos")).labels["test"] == [1]
    assert "leave --label_order out" in refusal(["neg", "pos"], ("pos", "neg"), test=split("pos"))
    assert "2 labels" in refusal(["a", "b", "c"], ("x", "y"), test=split("x"))
