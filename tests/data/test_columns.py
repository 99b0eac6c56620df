"""Columns and splits: usual names are found in any case and script; what could be another is refused, or said."""

from typing import Any

import pytest
from datasets import Dataset

from lib.config.sections import DataConfig
from lib.data.columns import check_columns, choose_splits, find_columns
from lib.data.trained_on import TrainedOn
from lib.errors import UserError

ROLES = ("train", "validation", "test")


def find(*names: str, cells: dict[str, str] | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """What is found in a file with these columns of text."""
    columns = {name: [(cells or {}).get(name, f"some {name}")] * 2 for name in names}
    return find_columns({"train": Dataset.from_dict(columns)}, DataConfig(train_file="t.csv", **options), TrainedOn())


def refusal(*names: str, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        find(*names, **options)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------- guesses


@pytest.mark.parametrize(
    ("names", "texts", "label"),
    [
        (("text", "label"), ("text",), "label"),
        (("Text", "Label"), ("Text",), "Label"),
        (("SENTENCE", "TARGET"), ("SENTENCE",), "TARGET"),
        (("text", " label"), ("text",), " label"),
        (("文本", "标签"), ("文本",), "标签"),
        (("评论", "情感"), ("评论",), "情感"),
        (("句子", "类别"), ("句子",), "类别"),
        (("內容", "標籤"), ("內容",), "標籤"),
        (("本文", "ラベル"), ("本文",), "ラベル"),
        (("Premise", "Hypothesis", "Label"), ("Premise", "Hypothesis"), "Label"),
        (("text", "Text", "label"), ("text",), "label"),
        (("comment", "mood"), ("comment",), "mood"),
    ],
)
def test_usual_names_are_found_in_any_case_and_script(
    names: tuple[str, ...], texts: tuple[str, ...], label: str
) -> None:
    options = {"label_column": "mood"} if "mood" in names else {}
    assert find(*names, **options)[:2] == (texts, (label,))


def test_columns_of_numbers_and_dates_are_not_the_text() -> None:
    cells = {"number": "12", "price": "1,250.00", "date": "2024-05-01", "flag": "True", "comment": "so far so good"}
    assert find("number", "price", "date", "flag", "comment", "label", cells=cells)[0] == ("comment",)
    assert find("text", "label", cells={"text": "10"})[0] == ("text",)


def test_column_of_the_other_role_is_not_guessed() -> None:
    assert find("text", "content", "rating", label_column="text")[:2] == (("content",), ("text",))
    assert find("category", "rating", text_columns=("category",))[:2] == (("category",), ("rating",))


def test_columns_that_could_be_meant_as_well_are_in_the_note() -> None:
    notes = find("text", "content", "label", "score")[2]
    assert any("content" in note and "--text_columns" in note for note in notes)
    assert any("score" in note and "--label_column" in note for note in notes)


def test_names_that_differ_in_case_only_are_refused() -> None:
    assert "'Text' or 'TEXT'" in refusal("Text", "TEXT", "label")
    assert "'Label' or 'LABEL'" in refusal("text", "Label", "LABEL")


def test_names_with_spaces_are_shown_in_quotes() -> None:
    assert "'my text', 'a b', mood" in refusal("my text", "a b", "mood")


def test_names_that_look_like_data_are_said_to_be() -> None:
    for names in (("what a fine film this is", "pos"), ("good", "1")):
        assert "first line" in refusal(*names)
    assert "first line" not in refusal("comment", "mood")


# ---------------------------------------------------------------------------------------------------- named columns


def check(texts: tuple[str, ...], labels: tuple[str, ...], **splits: dict[str, list[Any]]) -> str:
    with pytest.raises(UserError) as refused:
        check_columns({split: Dataset.from_dict(columns) for split, columns in splits.items()}, texts, labels)
    return str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text_columns": ("text", "text")}, "--text_columns names text twice"),
        ({"label_columns": ("a", "b", "a")}, "--label_columns names a twice"),
        ({"label_order": ("a", "b", "a")}, "--label_order names a twice"),
        ({"text_columns": ("label",), "label_column": "label"}, "--text_columns label"),
        ({"text_columns": ("a",), "label_columns": ("a", "b")}, "--text_columns a"),
        ({"label_order": ("a", "b"), "problem_type": "regression"}, "--label_order"),
        ({"label_order": ("a",)}, "--label_order"),
    ],
)
def test_column_or_label_in_two_roles_is_refused_at_the_command_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DataConfig(train_file="t.csv", **options)


def test_guessed_label_column_as_text_is_refused() -> None:
    texts, labels, _ = find("text", "label", text_columns=("text",))
    assert "--text_columns label" in check(("label",), labels, train={"text": ["a"], "label": ["b"]})
    assert "names text twice" in check((*texts, *texts), labels, train={"text": ["a"], "label": ["b"]})


def test_missing_column_is_refused_with_the_one_that_looks_like_it() -> None:
    message = check(("text",), ("label",), train={"text": ["a"], " Label": ["b"]})
    assert "--label_column label" in message
    assert "' Label'" in message


# ---------------------------------------------------------------------------------------------------- splits


def choose(
    *names: str, wanted: tuple[str, ...] = ROLES, dataset: str = "some/data"
) -> tuple[dict[str, str], list[str]]:
    """The stored name of the split that plays each role, and the notes."""
    raw = {name: Dataset.from_dict({"text": [name]}) for name in names}
    chosen, notes = choose_splits(raw, DataConfig(dataset=dataset), wanted)
    return {role: split["text"][0] for role, split in chosen.items()}, list(notes)


@pytest.mark.parametrize(
    "name", ["validation", "Validation", "dev", "Dev", "valid", "val", "eval", "EVAL", "evaluation", "development"]
)
def test_split_of_a_usual_name_is_validation(name: str) -> None:
    assert choose("train", name) == ({"train": "train", "validation": name}, [])


def test_train_and_test_have_other_usual_names_too() -> None:
    assert choose("Training", "Testing")[0] == {"train": "Training", "test": "Testing"}
    assert choose("TRAIN", "dev", "TEST")[0] == {"train": "TRAIN", "validation": "dev", "test": "TEST"}


def test_split_that_is_not_used_is_in_the_notes() -> None:
    chosen, (note,) = choose("train", "test", "unsupervised")
    assert chosen == {"train": "train", "test": "test"}
    assert "unsupervised" in note
    assert choose("train", "validation", "unsupervised", wanted=("validation",)) == ({"validation": "validation"}, [])


def test_splits_that_could_play_one_role_are_in_the_notes() -> None:
    chosen, (note,) = choose("train", "eval", "dev", "test")
    assert chosen["validation"] == "dev"
    assert "eval" in note
    assert choose("train", "dev", "validation")[0]["validation"] == "validation"


def test_split_of_any_name_can_be_wanted() -> None:
    assert choose("train", "Extra", wanted=("extra",))[0] == {"extra": "Extra"}
    with pytest.raises(UserError, match="there is no other split"):
        choose("train", wanted=("other",))


def test_validation_of_the_catalog_comes_first() -> None:
    names = ("train", "validation_matched", "validation_mismatched")
    chosen, notes = choose(*names, wanted=(*ROLES, "validation_mismatched"), dataset="mnli")
    assert (chosen["validation"], notes) == ("validation_matched", [])
