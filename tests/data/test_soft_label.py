"""Soft labels: probabilities of classes in every form that files and predict.py have, beside splits with hard labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, DataConfig
from lib.data.columns import find_columns, find_soft
from lib.data.files.opening import Source
from lib.data.files.tables import load_tables
from lib.data.labels.soft_label import encode_soft_labels
from lib.data.labels.targets import Targets, hard_labels
from lib.data.load import assign_folds, hold_out_validation
from lib.data.trained_on import UNKNOWN, TrainedOn
from lib.errors import UserError
from tests.conftest import write_csv

WANTED = [[0.25, 0.5, 0.25], [0.0, 0.0, 1.0]]
NAMES = ["bad", "good", "mixed"]
AS_DICTS = [{"bad": 0.25, "good": 0.5, "mixed": 0.25}, {"bad": 0.0, "good": 0.0, "mixed": 1.0}]


def split(**columns: Any) -> Dataset:
    size = len(next(iter(columns.values())))
    return Dataset.from_dict({"text": [f"text {row}" for row in range(size)], **columns})


def encode(
    *wanted: str, problem: str = CLASSIFICATION, names: Any = None, order: Any = (), **splits: Dataset
) -> Targets:
    return encode_soft_labels(splits, find_soft(splits, wanted), ("label",), problem, names, order)


def refusal(*wanted: str, **given: Any) -> str:
    with pytest.raises(UserError) as refused:
        encode(*wanted, **given)
    return str(refused.value)


FORMS: dict[str, dict[str, Any]] = {
    "a column for each class": {name: [row[name] for row in AS_DICTS] for name in NAMES},
    "columns of text": {name: [str(row[name]) for row in AS_DICTS] for name in NAMES},
    "csv of predict.py": {f"p/{name}": [str(row[name]) for row in AS_DICTS] for name in NAMES},
    "objects": {"p": AS_DICTS},
    "objects as text": {"p": list(map(json.dumps, AS_DICTS))},
    "objects as Python writes them": {"p": list(map(str, AS_DICTS))},
    "pipelines of transformers": {
        "p": [json.dumps([{"label": name, "score": row[name]} for name in NAMES]) for row in AS_DICTS]
    },
    "lists of objects": {"p": [[{"label": name, "score": row[name]} for name in NAMES] for row in AS_DICTS]},
    "lists": {"p": WANTED},
    "lists as text": {"p": list(map(str, WANTED))},
    "votes": {"p": ['{"bad": 1, "good": 2, "mixed": 1}', '{"mixed": 3}']},
    "columns of votes": {"bad": [1, 0], "good": [2, 0], "mixed": [1, 7]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_probabilities(form: str) -> None:
    columns = FORMS[form]
    wanted, order = (["p"], NAMES if form.split(" ")[0] == "lists" else ()) if len(columns) == 1 else (NAMES, ())
    found = encode(*(["p"] if "p/bad" in columns else wanted), order=order, train=split(**columns))
    assert found.names == NAMES
    assert found.labels["train"].dtype == np.float32
    assert found.labels["train"].tolist() == WANTED
    assert ("votes" in " ".join(found.notes)) == ("votes" in form)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_keep_columns_of_objects_only_where_they_are_asked_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    rows = [{"text": f"text {place}", "p": row, "other": {"deep": [1]}} for place, row in enumerate(AS_DICTS)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        write_csv(path, [(row["text"], json.dumps(row["p"])) for row in rows], ("text", "p"))
    else:
        Dataset.from_list(rows).to_parquet(path)
    files = {"train": [Source(str(path), path.name)]}
    tables = load_tables(files, objects=("p",))
    assert encode("p", train=tables["train"]).labels["train"].tolist() == WANTED
    assert tables["train"].column_names == ["text", "p"]
    assert load_tables(files)["train"].column_names == (["text", "p"] if kind == "csv" else ["text"])


def test_classes_are_in_the_order_of_the_rows_if_these_agree_else_sorted_or_as_label_order_says() -> None:
    same = split(p=['{"b": 0.5, "a": 0.5}', '{"b": 1, "a": 0}'])
    mixed = split(p=['{"b": 0.5, "a": 0.5}', '{"a": 0, "b": 1}'])
    assert encode("p", train=same).names == ["b", "a"]
    found = encode("p", train=mixed)
    assert (found.names, found.labels["train"].tolist()) == (["a", "b"], [[0.5, 0.5], [0.0, 1.0]])
    found = encode("p", train=mixed, order=["b", "a"])
    assert (found.names, found.labels["train"].tolist()) == (["b", "a"], [[0.5, 0.5], [1.0, 0.0]])


def test_splits_without_the_columns_keep_their_hard_labels_among_the_classes_of_train() -> None:
    train = split(p=AS_DICTS)
    for labels in (split(label=["mixed", "bad"]), split(label=[1, 0], label_text=["mixed", "bad"])):
        found = encode("p", train=train, validation=labels, test=split(p=[{"good": 1.0}]))
        assert found.labels["validation"].tolist() == [2, 0]
        assert found.labels["validation"].dtype == np.int64
        assert found.labels["test"].tolist() == [[0.0, 1.0, 0.0]]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["mixed", "good", "bad"])})
    named = Dataset.from_dict({"text": ["a", "b"], "label": [0, 2]}, features=features)
    assert encode("p", train=train, validation=named).labels["validation"].tolist() == [2, 0]
    message = refusal("p", train=train, validation=split(label=["good", "other"]))
    assert "row 2" in message
    assert "other" in message
    assert "bad, good, mixed" in message
    hidden = encode("p", train=train, test=split(label=[None, None]))
    assert "test" not in hidden.labels


def test_hard_train_and_soft_validation() -> None:
    found = encode("p", train=split(label=["mixed", "bad", "good"]), validation=split(p=AS_DICTS))
    assert (found.names, found.labels["train"].tolist()) == (NAMES, [2, 0, 1])
    assert found.labels["validation"].tolist() == WANTED
    assert "awful" in refusal("p", train=split(label=["good", "bad"]), validation=split(p=[{"bad": 0.5, "awful": 0.5}]))


def test_column_without_any_value_leaves_a_split_its_hard_labels() -> None:
    validation = split(p=[None, None], label=["bad", "mixed"])
    assert encode("p", train=split(p=AS_DICTS), validation=validation).labels["validation"].tolist() == [0, 2]


def test_outputs_of_an_existing_model_decide_the_order() -> None:
    found = encode("p", names=["mixed", "good", "bad", "other"], test=split(p=AS_DICTS))
    assert found.labels["test"].tolist() == [[0.25, 0.5, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert "not those of the data" in refusal("p", names=["x", "y"], test=split(p=AS_DICTS))
    found = encode("p", names=["LABEL_0", "LABEL_1", "LABEL_2"], order=["good", "mixed", "bad"], test=split(p=AS_DICTS))
    assert (found.names, found.labels["test"][0].tolist()) == (["good", "mixed", "bad"], [0.5, 0.25, 0.25])


def test_rounded_probabilities_are_divided_by_their_sum() -> None:
    found = encode("p", train=split(p=[{"a": 0.3333, "b": 0.3333, "c": 0.3333}, {"a": 0.1, "b": 0.9005, "c": 0}]))
    np.testing.assert_allclose(found.labels["train"].sum(axis=1), 1, atol=1e-7)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"a": 0.5, "b": 0.4}', ("row 2 of the train split", "0.9", "--top_k", "multi_label")),
        ('{"a": 0.9, "b": 0.4}', ("row 2 of the train split", "1.3")),
        ('{"a": 1.5, "b": -0.5}', ("row 2 of the train split", "-0.5", "logits")),
        ('{"a": Infinity, "b": 0}', ("row 2 of the train split", "inf")),
        ('{"a": NaN, "b": 1}', ("row 2 of the train split", "NaN")),
        ('{"a": "high", "b": 1}', ("row 2 of the train split", "high")),
        ("positive", ("row 2 of the train split", "positive")),
        ("[0.5, 0.5]", ("row 2 of the train split", "another form")),
        ('[{"label": "a", "score": 0.5}, {"label": "a", "score": 0.5}]', ("row 2 of the train split",)),
        ("0.5", ("row 2 of the train split", "0.5")),
        (None, ("1 of 2 rows of the train split", "2")),
        ("{}", ("1 of 2 rows of the train split", "2")),
        ('{"a": 0, "b": 0}', ("row 2 of the train split", "sum to 0")),
    ],
)
def test_what_is_no_distribution_is_refused_with_its_row(row: Any, words: tuple[str, ...]) -> None:
    message = refusal("p", train=split(p=['{"a": 0.5, "b": 0.5}', row]))
    for word in words:
        assert word in message


def test_columns_that_hold_no_numbers_are_refused_with_the_row() -> None:
    assert "row 2" in refusal("a", "b", train=split(a=["0.5", "nan"], b=["0.5", "0.5"]))
    assert "rows 2" in refusal("a", "b", train=split(a=[0.5, None], b=[0.5, 1.0]))
    assert "such column" in refusal("a", "c", train=split(a=[0.5], b=[0.5]))


def test_lists_need_the_names_of_the_classes() -> None:
    assert "--label_order" in refusal("p", train=split(p=WANTED))
    assert "3 numbers" in refusal("p", train=split(p=WANTED), order=["a", "b"])


def test_multi_label_probabilities_are_independent() -> None:
    given = split(p=['{"joy": 0.9, "fear": 0.8}', '{"joy": 0.1, "fear": 0}'])
    found = encode("p", problem=MULTI_LABEL, train=given, validation=split(label=[["fear"], []]))
    assert found.labels["train"].tolist() == pytest.approx(np.array([[0.9, 0.8], [0.1, 0]], np.float32))
    assert found.labels["validation"].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert "row 1" in refusal("p", problem=MULTI_LABEL, train=split(p=[{"joy": 2, "fear": 0}]))


def test_most_probable_class_counts_and_of_equal_ones_the_first() -> None:
    assert hard_labels(np.array([[0.2, 0.8], [0.5, 0.5], [1, 0]]), CLASSIFICATION).tolist() == [1, 0, 0]
    assert hard_labels(np.array([[0.2, 0.8], [0.5, 0.4]]), MULTI_LABEL).tolist() == [[0, 1], [1, 0]]
    assert hard_labels(np.array([2, 0]), CLASSIFICATION).tolist() == [2, 0]
    assert "1 rows" in " ".join(encode("p", train=split(p=[{"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0}])).notes)


def test_soft_labels_are_stratified_by_their_most_probable_class() -> None:
    rng = np.random.default_rng(0)
    soft = rng.dirichlet(np.ones(3), 200).astype(np.float32)
    hard = soft.argmax(axis=1)
    for part in (hold_out_validation, lambda labels, problem: assign_folds(labels, problem, 5)):
        np.testing.assert_array_equal(part(soft, CLASSIFICATION), part(hard, CLASSIFICATION))


def columns_of(
    trained_on: TrainedOn = UNKNOWN, /, *, train: Dataset, other: Dataset | None = None, **options: Any
) -> Any:
    raw = {"train": train} | ({"validation": other} if other is not None else {})
    return find_columns(raw, DataConfig(train_file="t.csv", **options), trained_on)


def test_label_column_is_guessed_in_a_split_that_has_no_probabilities() -> None:
    teacher, gold = split(label=["a"], p=[{"a": 1.0, "b": 0.0}]), split(target=["a"])
    assert columns_of(train=teacher, other=gold, soft_labels=("p",))[:2] == (("text",), ("target",))
    assert columns_of(train=teacher, soft_labels=("p",))[:2] == (("text",), ())
    with pytest.raises(UserError, match="--soft_labels q"):
        columns_of(train=teacher, soft_labels=("q",))
    notes = columns_of(train=teacher, soft_labels=("p",), label_column="label")[2]
    assert "not used" in " ".join(notes)


def test_soft_labels_of_the_training_may_be_absent() -> None:
    trained = TrainedOn("t", ("text",), ("label",), 64, ("accuracy",), False, ("p",))
    texts, labels, notes = columns_of(trained, train=split(label=["a"]), soft_labels=("p",))
    assert (texts, labels) == (("text",), ("label",))
    assert "trained on the soft labels p" in " ".join(notes)
