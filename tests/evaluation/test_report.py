"""What is said about a scored split, checked by hand and against statistics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from lib.config.sections import MULTI_LABEL
from lib.data.load import Data
from lib.evaluation.intervals import bootstrap_intervals, score_counts, score_rows
from lib.evaluation.predictions import Predictions
from lib.evaluation.report import confident_errors, expected_calibration_error, format_report, row_texts, write_report
from lib.evaluation.scores import compute_metrics, load_metric, metric_settings
from lib.evaluation.tables import class_table, confusion_matrix

NAMES = ["bad", "good", "größer"]
METRICS = ["accuracy", "f1_macro", "matthews_correlation"]


def from_probabilities(probabilities: list[list[float]], labels: list[int]) -> Predictions:
    table = np.array(probabilities)
    losses = -np.log(table[np.arange(len(labels)), labels])
    return Predictions(np.log(table).astype(np.float32), np.array(labels), losses.astype(np.float32))


def random_predictions(samples: int, skill: float = 1.0, classes: int = 3) -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=samples)
    logits = rng.normal(size=(samples, classes)) + skill * np.eye(classes)[labels]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(samples), labels]
    return Predictions(logits.astype(np.float32), labels, losses.astype(np.float32))


@pytest.fixture
def three() -> Predictions:
    """Three samples: right and sure, wrong and unsure, wrong and sure."""
    return from_probabilities([[0.9, 0.06, 0.04], [0.2, 0.5, 0.3], [0.01, 0.01, 0.98]], [0, 2, 1])


# ---------------------------------------------------------------------------------------------------- tables


def test_confusion_matrix_by_hand() -> None:
    matrix = confusion_matrix(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 0]), 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]


def test_class_table_agrees_with_the_macro_scores() -> None:
    predictions = random_predictions(200)
    rows = class_table(predictions, NAMES)
    scores = compute_metrics(predictions, ["precision_macro", "recall_macro", "f1_macro"])
    for name in ("precision", "recall", "f1"):
        assert np.mean([row[name] for row in rows]) == pytest.approx(scores[f"{name}_macro"])
    assert [row["class"] for row in rows] == NAMES
    assert [row["samples"] for row in rows] == np.bincount(predictions.labels).tolist()


def test_a_class_that_never_occurs_scores_zero() -> None:
    rows = class_table(from_probabilities([[0.9, 0.1], [0.8, 0.2]], [0, 0]), ["bad", "good"])
    assert rows[1] == {"class": "good", "precision": 0.0, "recall": 0.0, "f1": 0.0, "samples": 0}


# ---------------------------------------------------------------------------------------------------- calibration


def test_calibration_error_by_hand() -> None:
    """Of 15 bins, the tenth holds 0.61 right and 0.65 wrong, the fourteenth 0.9 right, the last one 1.0 wrong."""
    confident = [0.61, 0.65, 0.9, 1 - 1e-12]
    predictions = from_probabilities([[p, 1 - p] for p in confident], [0, 1, 0, 1])
    expected = (abs(0.61 + 0.65 - 1) + abs(0.9 - 1) + abs(1 - 0)) / 4
    assert expected_calibration_error(predictions) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_is_small_when_confidence_is_honest() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    labels = (rng.random(20_000) > confidence).astype(int).tolist()
    honest = np.stack([confidence, 1 - confidence], axis=1)
    boastful = np.stack([np.full(20_000, 0.99), np.full(20_000, 0.01)], axis=1)
    assert expected_calibration_error(from_probabilities(honest.tolist(), labels)) < 0.02
    assert expected_calibration_error(from_probabilities(boastful.tolist(), labels)) == pytest.approx(0.24, abs=0.02)


# ---------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("samples", [50, 500])
def test_intervals_cover_the_scores(samples: int) -> None:
    predictions = random_predictions(samples)
    intervals = bootstrap_intervals(predictions, METRICS, 200, seed=1)
    scores = compute_metrics(predictions, METRICS)
    assert set(intervals) == set(scores)
    for name, (low, high) in intervals.items():
        assert low < scores[name] < high


def test_intervals_depend_on_the_seed_alone() -> None:
    predictions = random_predictions(50)
    first, again, other = (bootstrap_intervals(predictions, ["accuracy"], 100, seed) for seed in (1, 1, 2))
    assert first == again
    assert first["loss"] != other["loss"]


def test_interval_of_accuracy_is_as_wide_as_the_normal_one() -> None:
    predictions = random_predictions(2000)
    accuracy = compute_metrics(predictions, ["accuracy"])["accuracy"]
    low, high = bootstrap_intervals(predictions, ["accuracy"], 1000, seed=0)["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(accuracy * (1 - accuracy) / 2000), rel=0.15)
    assert 0.1 < accuracy < 0.9


def test_interval_of_the_loss_is_as_wide_as_the_normal_one() -> None:
    predictions = random_predictions(2000)
    low, high = bootstrap_intervals(predictions, [], 1000, seed=0)["loss"]
    assert high - low == pytest.approx(2 * 1.96 * predictions.losses.std() / np.sqrt(2000), rel=0.15)


def test_intervals_of_scores_over_a_confusion_matrix_equal_resampling_of_samples() -> None:
    predictions = random_predictions(300)
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(300):
        chosen = rng.integers(300, size=300)
        sample = Predictions(predictions.logits[chosen], predictions.labels[chosen], predictions.losses[chosen])
        rows = class_table(sample, NAMES)
        resampled.append(np.mean([row["f1"] for row in rows]))
    expected = np.percentile(resampled, [2.5, 97.5])
    assert bootstrap_intervals(predictions, ["f1_macro"], 1000, seed=0)["f1_macro"] == pytest.approx(
        expected, abs=0.015
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_over_counts_are_those_of_the_metrics_themselves(classes: int) -> None:
    rng = np.random.default_rng(3)
    counts = rng.multinomial(40, rng.dirichlet(np.full(classes**2, 0.3)), size=20).reshape(20, classes, classes)
    counts[0], counts[1, :, 1:] = np.diag(counts[0].diagonal()), 0  # nothing wrong; one class predicted only
    averages = [f"{name}_{how}" for name in ("f1", "precision", "recall") for how in ("macro", "micro", "weighted")]
    names = ["accuracy", "matthews_correlation", "cohen_kappa", *averages]
    counts[:, 0, 0] += 1
    gold, predicted = np.indices((classes, classes)).reshape(2, -1)
    for name in [*names, *(["f1", "precision", "recall"] if classes == 2 else [])]:
        module, settings = metric_settings(name, classes)
        compute = load_metric(module)._compute
        expected = [compute(predicted.repeat(c), gold.repeat(c), **settings)[module] for c in map(np.ravel, counts)]
        np.testing.assert_allclose(score_counts(module, counts, settings), expected, atol=1e-12, err_msg=name)


def test_scores_of_several_labels_over_counts_are_those_of_the_metrics_themselves() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 3)).astype(np.float32), (rng.random((30, 3)) < 0.4).astype(np.int64)
    labels[:, 2] = 0
    predictions = Predictions(logits, labels, np.zeros(30, dtype=np.float32), problem_type=MULTI_LABEL)
    rows = rng.integers(30, size=(20, 30))
    for name in [
        f"{metric}_{how}" for metric in ("f1", "precision", "recall") for how in ("macro", "micro", "weighted")
    ]:
        module, settings = metric_settings(name, 3, MULTI_LABEL)
        compute = load_metric(module, MULTI_LABEL)._compute
        expected = [compute(predictions.predicted[row], labels[row], **settings)[module] for row in rows]
        np.testing.assert_allclose(score_rows(module, rows, predictions, settings), expected, atol=1e-12, err_msg=name)


# ---------------------------------------------------------------------------------------------------- texts


def test_texts_of_pairs_are_lists_of_two() -> None:
    pairs = Dataset.from_dict({"premise": ["a", "b"], "hypothesis": ["c", "d"]})
    assert row_texts(pairs) == [["a", "c"], ["b", "d"]]
    assert row_texts(pairs.select_columns(["premise"])) == ["a", "b"]


def test_confident_errors_come_surest_first(three: Predictions) -> None:
    errors = confident_errors(three, Dataset.from_dict({"text": ["x", "y", "z"]}), NAMES)
    assert [row[:4] for row in errors] == [[2, "z", "good", "größer"], [1, "y", "größer", "good"]]
    assert [row[4] for row in errors] == pytest.approx([0.98, 0.5])


def test_confident_errors_of_pairs_and_of_a_flawless_model() -> None:
    pairs = Dataset.from_dict({"first": ["a"], "second": ["b"]})
    assert confident_errors(from_probabilities([[0.3, 0.7]], [0]), pairs, NAMES)[0][1] == "a | b"
    assert confident_errors(from_probabilities([[0.3, 0.7]], [1]), pairs, NAMES) == []


def test_confident_errors_are_limited_to_the_surest() -> None:
    predictions = random_predictions(300, skill=0)
    texts = Dataset.from_dict({"text": [str(index) for index in range(300)]})
    everything, few = (confident_errors(predictions, texts, NAMES, limit) for limit in (300, 5))
    confidence = [row[4] for row in everything]
    assert confidence == sorted(confidence, reverse=True)
    assert len(everything) == (predictions.predicted != predictions.labels).sum()
    assert few == everything[:5]


# ---------------------------------------------------------------------------------------------------- files


def report(folder: Path, predictions: Predictions, **columns: list[str]) -> str:
    data = Data("made up", {"test": Dataset.from_dict(columns)}, {}, {}, NAMES, tuple(columns), ())
    scores = compute_metrics(predictions, METRICS)
    return write_report(folder, "test", scores, METRICS, predictions, data, resamples=50)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_predictions_file_holds_a_line_per_sample_in_input_order(tmp_path: Path, three: Predictions) -> None:
    report(tmp_path, three, text=["first", "zweiter – größer", "third\nline"])
    rows = lines(tmp_path)
    assert [list(row) for row in rows] == [["index", "text", "gold", "predicted", "probabilities"]] * 3
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["text"] for row in rows] == ["first", "zweiter – größer", "third\nline"]
    assert [(row["gold"], row["predicted"]) for row in rows] == [("bad", "bad"), ("größer", "good"), ("good", "größer")]
    assert all(list(row["probabilities"]) == NAMES for row in rows)
    assert [sum(row["probabilities"].values()) for row in rows] == pytest.approx([1, 1, 1], abs=1e-5)
    assert "größer" in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")


def test_predictions_file_of_pairs_holds_both_texts(tmp_path: Path, three: Predictions) -> None:
    report(tmp_path, three, premise=["a", "b", "c"], hypothesis=["d", "e", "f"])
    assert [row["text"] for row in lines(tmp_path)] == [["a", "d"], ["b", "e"], ["c", "f"]]


def test_report_file_holds_scores_intervals_and_matrix(tmp_path: Path, three: Predictions) -> None:
    report(tmp_path / "new" / "folder", three, text=["x", "y", "z"])
    record = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8"))
    assert record["scores"]["accuracy"] == pytest.approx(1 / 3)
    assert record["scores"]["calibration_error"] == pytest.approx(expected_calibration_error(three))
    assert set(record["intervals_95"]) == {"loss", *METRICS}
    assert record["confusion_matrix"] == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert [row["class"] for row in record["classes"]] == NAMES
    assert (record["split"], record["samples"]) == ("test", 3)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.filterwarnings("ignore")
def test_report_with_a_score_that_is_not_defined_is_strict_json(tmp_path: Path) -> None:
    data = Data("made up", {"test": Dataset.from_dict({"text": ["x", "y"]})}, {}, {}, NAMES[:2], ("text",), ())
    predictions = from_probabilities([[0.9, 0.1], [0.8, 0.2]], [0, 0])
    write_report(
        tmp_path,
        "test",
        compute_metrics(predictions, ["cohen_kappa"]),
        ["cohen_kappa"],
        predictions,
        data,
        resamples=20,
    )
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse_constant)
    assert record["scores"]["cohen_kappa"] == "NaN"
    assert record["intervals_95"]["cohen_kappa"] == ["NaN", "NaN"]


@pytest.mark.parametrize("classes", [2, 3, 31])
def test_confusion_matrix_is_drawn_as_png(tmp_path: Path, classes: int) -> None:
    predictions = random_predictions(100, classes=classes)
    names = [f"class {index}" for index in range(classes)]
    data = Data("x", {"test": Dataset.from_dict({"text": ["t"] * 100})}, {}, {}, names, ("text",), ())
    write_report(tmp_path, "test", {}, [], predictions, data, resamples=5)
    assert (tmp_path / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_report_text_names_every_class_score_and_interval(tmp_path: Path, three: Predictions) -> None:
    text = report(tmp_path, three, text=["x", "y", "z"])
    scores, classes, matrix = (block.splitlines() for block in text.split("\n\n"))
    assert [line.split()[0] for line in scores[1:]] == ["loss", *METRICS, "calibration_error"]
    assert "test (3 samples)" in scores[0]
    assert all(" to " in line for line in scores[1:-1])
    assert [line.split()[0] for line in classes[1:]] == NAMES
    assert [line.split() for line in matrix[1:]] == [
        ["bad", "1", "0", "0"],
        ["good", "0", "0", "1"],
        ["größer", "0", "1", "0"],
    ]
    assert all(len({len(line) for line in block}) == 1 for block in (scores, classes, matrix))


def test_report_text_leaves_out_intervals_that_are_not_known(three: Predictions) -> None:
    text = format_report("test", {"loss": 1.5, "rouge": 0.25}, {"loss": (1.0, 2.0)}, three, NAMES)
    rows = {line.split()[0]: line.split()[1:] for line in text.split("\n\n")[0].splitlines()[1:]}
    assert rows == {"loss": ["1.5000", "1.0000", "to", "2.0000"], "rouge": ["0.2500"]}
