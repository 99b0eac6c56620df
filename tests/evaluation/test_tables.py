"""Tables by hand and against scikit-learn."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from lib.config.sections import REGRESSION
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import compute_metrics
from lib.evaluation.tables import (
    build_tables,
    class_table,
    confusion_matrix,
    confusion_table,
    format_table,
    format_tables,
    label_table,
    most_mistaken,
    range_table,
)
from tests.evaluation.samples import class_predictions, from_probabilities, label_predictions

CLASSES = ["bad", "good", "größer"]
LABELS = ["rare", "half", "often"]


def test_confusion_matrix_by_hand() -> None:
    gold, predicted = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 0])
    matrix = confusion_matrix(Predictions(np.eye(4, dtype=np.float32)[predicted], gold, np.zeros(5)))
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]


def test_class_table_agrees_with_macro_scores() -> None:
    predictions = class_predictions(200)
    rows = class_table(predictions, CLASSES)
    scores = compute_metrics(predictions, ["precision_macro", "recall_macro", "f1_macro"])
    for name in ("precision", "recall", "f1"):
        assert np.mean([row[name] for row in rows]) == pytest.approx(scores[f"{name}_macro"])
    assert [row["class"] for row in rows] == CLASSES
    assert [row["samples"] for row in rows] == np.bincount(predictions.labels).tolist()


def test_class_that_never_occurs_scores_zero() -> None:
    rows = class_table(from_probabilities([[0.9, 0.1], [0.8, 0.2]], [0, 0]), ["bad", "good"])
    assert rows[1] == {"class": "good", "precision": 0.0, "recall": 0.0, "f1": 0.0, "samples": 0}


def test_range_table_by_hand() -> None:
    gold = np.array([0, 1, 5, 4.5, 10], dtype=np.float32)
    rows = range_table(Predictions(gold[:, None] + np.float32(1), gold, np.ones(5), problem_type=REGRESSION))
    assert [(row["from"], row["to"], row["samples"]) for row in rows] == [(0, 2, 2), (4, 6, 2), (8, 10, 1)]
    assert [(row["gold"], row["predicted"], row["mae"]) for row in rows] == [
        (0.5, 1.5, 1),
        (4.75, 5.75, 1),
        (10, 11, 1),
    ]


def test_equal_numbers_are_one_range() -> None:
    equal = Predictions(np.zeros((3, 1), np.float32), np.ones(3, np.float32), np.ones(3), problem_type=REGRESSION)
    assert [row["samples"] for row in range_table(equal)] == [3]


def test_label_table_equals_scikit_learn() -> None:
    predictions = label_predictions(90)
    for number, row in enumerate(label_table(predictions, LABELS)):
        gold, probabilities = predictions.labels[:, number], predictions.probabilities[:, number]
        assert row["label"] == LABELS[number]
        assert row["f1"] == pytest.approx(f1_score(gold, probabilities >= row["threshold"]))
        assert row["average_precision"] == pytest.approx(average_precision_score(gold, probabilities))
        assert row["samples"] == gold.sum()


def test_label_table_agrees_with_macro_scores() -> None:
    predictions = label_predictions(90)
    rows, scores = label_table(predictions, LABELS), compute_metrics(predictions, ["f1_macro", "average_precision"])
    assert scores["f1_macro"] == pytest.approx(np.mean([row["f1"] for row in rows]))
    assert scores["average_precision"] == pytest.approx(np.mean([row["average_precision"] for row in rows]))


def test_text_tells_where_thresholds_come_from() -> None:
    predictions = label_predictions(9)
    tables, without = build_tables(predictions, LABELS), dataclasses.replace(predictions, thresholds=None)
    assert "validation" in format_tables(tables, predictions, LABELS)[1]
    assert "none of its own" in format_tables(tables, without, LABELS)[1]


def test_threshold_of_two_classes_is_told_with_where_it_comes_from() -> None:
    made = dataclasses.replace(class_predictions(40, 2), thresholds=np.array([0.7, 0.3]))
    tables = build_tables(made, ["no", "yes"])
    assert tables["curves"]["threshold"] == 0.3
    (said,) = (block for block in format_tables(tables, made, ["no", "yes"]) if "Threshold" in block)
    assert "yes" in said
    assert "0.3" in said
    assert "validation" in said
    given = dataclasses.replace(made, thresholds_given=True)
    assert "--threshold" in "".join(format_tables(tables, given, ["no", "yes"]))


def test_areas_of_two_classes_equal_scikit_learn() -> None:
    made = dataclasses.replace(class_predictions(80, 2), temperature=3.0)
    tables, second = build_tables(made, ["no", "yes"]), made.probabilities[:, 1]
    row = tables["curves"]
    assert f"{row['roc_auc']:.4f}" in "".join(format_tables(tables, made, ["no", "yes"]))
    assert row["roc_auc"] == pytest.approx(roc_auc_score(made.labels, second))
    assert row["average_precision"] == pytest.approx(average_precision_score(made.labels, second))
    one = build_tables(made.take(made.labels == 1), ["no", "yes"])["curves"]
    assert np.isnan(one["roc_auc"])


def test_class_that_is_never_predicted_is_named_with_its_samples() -> None:
    predicted, gold = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 2, 1])
    made = Predictions(np.eye(4, dtype=np.float32)[predicted], gold, np.zeros(5))
    names = ["bad", "good", "lost", "absent"]
    (said,) = (block for block in format_tables(build_tables(made, names), made, names) if "Never" in block)
    assert "lost (2)" in said
    assert "absent" not in said
    assert "bad" not in said
    labels = label_predictions(60)
    nothing = dataclasses.replace(labels, thresholds=np.array([1.0, 0.5, 0.5]))
    assert "rare" in format_tables(build_tables(nothing, LABELS), nothing, LABELS)[-1]
    assert "Never" not in "".join(format_tables(build_tables(labels, LABELS), labels, LABELS))


def test_confusions_and_classes_with_mistakes_by_hand() -> None:
    gold, predicted = np.array([0, 0, 1, 2, 2, 3]), np.array([0, 1, 1, 0, 0, 3])
    predictions = Predictions(np.eye(4, dtype=np.float32)[predicted], gold, np.zeros(6))
    assert confusion_table(predictions, "abcd") == [
        {"gold": "c", "predicted": "a", "samples": 2},
        {"gold": "a", "predicted": "b", "samples": 1},
    ]
    assert most_mistaken(predictions, 3).tolist() == [0, 2, 1]
    assert confusion_matrix(predictions, [0, 2]).tolist() == [[1, 0], [2, 0]]


@pytest.mark.parametrize("make", [class_predictions, label_predictions], ids=["classes", "labels"])
def test_text_of_thousands_of_classes_is_short_and_names_the_file_that_has_all(make: Any) -> None:
    predictions = make(3000, 2000)
    names = [f"a class with a long name, number {number:04}" * 9 for number in range(2000)]
    tables = build_tables(predictions, names)
    text = "\n\n".join(format_tables(tables, predictions, names, "somewhere/report.json"))
    assert len(text) < 10_000
    assert "20 of 2,000" in text
    assert "somewhere/report.json" in text
    assert all(len(table) == 2000 for name, table in tables.items() if name in ("classes", "labels"))
    assert len(json.dumps(tables)) < 10 * len(json.dumps(names))


def test_file_has_every_confusion_of_many_classes() -> None:
    predictions = class_predictions(500, 70)
    names = [f"class {number}" for number in range(70)]
    tables = build_tables(predictions, names)
    assert "confusion_matrix" not in tables
    wrong = (predictions.labels != predictions.predicted).sum()
    assert sum(row["samples"] for row in tables["confusions"]) == wrong > 0


def test_perfect_predictions_of_many_classes_have_no_confusions() -> None:
    classes = np.arange(100)
    predictions = Predictions(np.eye(100, dtype=np.float32), classes, np.zeros(100, np.float32))
    names = list(map(str, classes))
    assert "confus" not in "".join(format_tables(build_tables(predictions, names), predictions, names))


@pytest.mark.parametrize("name", ["正面", "👎", "ไม่ดี", "שלילי", "e\u0301", "plain"])
def test_columns_are_aligned_as_a_terminal_shows_them(name: str) -> None:
    lines = format_table([["class", "samples"], [name, "7"], ["negative", "12"]]).splitlines()
    assert len({cell_len(line) for line in lines}) == 1


def test_name_cannot_break_a_table_or_move_the_cursor() -> None:
    predictions, names = class_predictions(50), ["a\tb", "c\nd\r", "\x1b[2Je\u202e\u2028"]
    text = "\n\n".join(format_tables(build_tables(predictions, names), predictions, names))
    assert text.replace("\n", "").isprintable()
    assert len(text.splitlines()) == 4 + 1 + 4 + 1 + (1 + len(build_tables(predictions, names)["coverage"]))
    assert all(shown in text for shown in ("a\\tb", "c\\nd\\r", "\\x1b[2Je\\u202e"))
