"""The files and the text of a report, its calibration error, and the worst rows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from lib.data.load import Data
from lib.evaluation.calibration import cross_entropy, expected_calibration_error
from lib.evaluation.intervals import bootstrap_intervals
from lib.evaluation.plots import draw, picture_names
from lib.evaluation.predictions import Predictions
from lib.evaluation.report import (
    format_report,
    row_texts,
    worst_rows,
    write_predictions,
    write_report,
)
from lib.evaluation.scores import compute_metrics
from lib.evaluation.scoring import Scored
from lib.evaluation.tables import build_tables
from tests.evaluation.samples import class_predictions, from_probabilities, label_predictions, number_predictions

NAMES = ["bad", "good", "größer"]
METRICS = ["accuracy", "f1_macro", "matthews_correlation"]


@pytest.fixture
def three() -> Predictions:
    """Three samples: right and sure, wrong and unsure, wrong and sure."""
    return from_probabilities([[0.9, 0.06, 0.04], [0.2, 0.5, 0.3], [0.01, 0.01, 0.98]], [0, 2, 1])


def report(folder: Path, predictions: Predictions, metrics: list[str], **columns: list[str]) -> str:
    names = NAMES[: predictions.logits.shape[1]]
    data = Data("made up", {"test": Dataset.from_dict(columns)}, {}, {}, names, tuple(columns), ())
    intervals = bootstrap_intervals(predictions, metrics, resamples=50)
    scored = Scored(compute_metrics(predictions, metrics), predictions)
    return write_report(folder, "test", scored, intervals, data)


def test_report_file_holds_scores_intervals_and_matrix(tmp_path: Path, three: Predictions) -> None:
    report(tmp_path / "new" / "folder", three, METRICS, text=["x", "y", "z"])
    record = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8"))
    assert record["scores"]["accuracy"] == pytest.approx(1 / 3)
    assert record["scores"]["calibration_error"] == pytest.approx(expected_calibration_error(three))
    assert set(record["intervals_95"]) == {"loss", *METRICS}
    assert record["confusion_matrix"] == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert [row["class"] for row in record["classes"]] == NAMES
    assert (record["split"], record["samples"]) == ("test", 3)


def test_report_says_that_outputs_are_not_numbers(tmp_path: Path, three: Predictions) -> None:
    three.logits[1] = np.nan
    assert "1 of 3 samples are NaN" in report(tmp_path, three, METRICS, text=["x", "y", "z"])
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["scores"]["calibration_error"] == "NaN"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_report_file_with_an_undefined_score_is_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report(tmp_path, from_probabilities([[0.9, 0.1], [0.8, 0.2]], [0, 0]), ["cohen_kappa"], text=["x", "y"])
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert record["scores"]["cohen_kappa"] == "NaN"
    assert record["intervals_95"]["cohen_kappa"] == ["NaN", "NaN"]


def test_report_text_names_every_score_interval_and_class(tmp_path: Path, three: Predictions) -> None:
    text = report(tmp_path, three, METRICS, text=["x", "y", "z"])
    scores, classes, matrix, coverage, *_ = (block.splitlines() for block in text.split("\n\n"))
    assert [line.split()[0] for line in scores[1:]] == ["loss", *METRICS, "calibration_error"]
    assert "test (3 samples)" in scores[0]
    assert all(" to " in line for line in scores[1:-1])
    assert [line.split()[0] for line in classes[1:]] == NAMES
    assert [line.split() for line in matrix[1:]] == [
        ["bad", "1", "0", "0"],
        ["good", "0", "0", "1"],
        ["größer", "0", "1", "0"],
    ]
    assert coverage[0].split() == ["abstain_below", "coverage", "accuracy", "samples"]
    assert all(len({len(line) for line in block}) == 1 for block in (scores, classes, matrix, coverage))


@pytest.mark.parametrize("make", [class_predictions, label_predictions])
def test_report_has_calibration_before_and_after_the_temperature(tmp_path: Path, make: Any) -> None:
    bare = make(90)
    made = dataclasses.replace(bare, temperature=2.5)
    text = report(tmp_path, made, ["accuracy"], text=["x"] * 90)
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    scores = record["scores"]
    assert scores["loss"] == pytest.approx(bare.losses.mean(), rel=1e-5)
    assert scores["loss_at_temperature"] == pytest.approx(cross_entropy(made))
    assert scores["calibration_error"] == pytest.approx(expected_calibration_error(bare))
    assert scores["calibration_error_at_temperature"] == pytest.approx(expected_calibration_error(made))
    assert record["temperature"] == 2.5
    assert all(name in text for name in scores)
    assert "2.5, fitted on validation." in text
    for row, probabilities in zip(lines(tmp_path), made.probabilities, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(probabilities, abs=1e-6)
    assert "temperature" not in report(tmp_path, bare, ["accuracy"], text=["x"] * 90)


def test_report_says_that_the_temperature_was_fitted_on_the_split_itself(tmp_path: Path) -> None:
    made = dataclasses.replace(class_predictions(30), temperature=1.5)
    data = Data("made up", {"validation": Dataset.from_dict({"text": ["x"] * 30})}, {}, {}, NAMES, ("text",), ())
    text = write_report(tmp_path, "validation", Scored(compute_metrics(made, []), made), {}, data)
    assert "which is this split" in text


def test_report_text_leaves_out_unknown_intervals(three: Predictions) -> None:
    text = format_report("test", Scored({"loss": 1.5, "rouge": 0.25}, three), {"loss": (1.0, 2.0)})
    rows = {line.split()[0]: line.split()[1:] for line in text.split("\n\n")[0].splitlines()[1:]}
    assert rows == {"loss": ["1.5000", "1.0000", "to", "2.0000"], "rouge": ["0.2500"]}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_predictions_file_holds_a_line_per_sample_in_input_order(tmp_path: Path, three: Predictions) -> None:
    report(tmp_path, three, METRICS, text=["first", "zweiter – größer", "third\nline"])
    rows = lines(tmp_path)
    assert [list(row) for row in rows] == [["index", "text", "gold", "predicted", "probabilities"]] * 3
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["text"] for row in rows] == ["first", "zweiter – größer", "third\nline"]
    assert [(row["gold"], row["predicted"]) for row in rows] == [("bad", "bad"), ("größer", "good"), ("good", "größer")]
    assert all(list(row["probabilities"]) == NAMES for row in rows)
    assert [sum(row["probabilities"].values()) for row in rows] == pytest.approx([1, 1, 1], abs=1e-5)
    assert "größer" in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")


def test_predictions_file_of_pairs_holds_both_texts(tmp_path: Path, three: Predictions) -> None:
    report(tmp_path, three, METRICS, premise=["a", "b", "c"], hypothesis=["d", "e", "f"])
    assert [row["text"] for row in lines(tmp_path)] == [["a", "d"], ["b", "e"], ["c", "f"]]


def test_row_texts_of_pairs_are_lists_of_two() -> None:
    pairs = Dataset.from_dict({"premise": ["a", "b"], "hypothesis": ["c", "d"]})
    assert row_texts(pairs) == [["a", "c"], ["b", "d"]]
    assert row_texts(pairs.select_columns(["premise"])) == ["a", "b"]


@pytest.mark.parametrize("make", [class_predictions, number_predictions, label_predictions])
def test_worst_rows_have_the_largest_losses_first(make: Any) -> None:
    predictions = make(30)
    texts = Dataset.from_dict({"text": [f"text {row}" for row in range(30)]})
    columns, rows = worst_rows(predictions, texts, NAMES, limit=5)
    assert columns == ["index", "text", "gold", "predicted", "loss"]
    assert [row[0] for row in rows] == np.argsort(-predictions.losses, kind="stable")[:5].tolist()
    assert [row[1] for row in rows] == [f"text {row[0]}" for row in rows]
    assert [row[4] for row in rows] == pytest.approx(np.sort(predictions.losses)[::-1][:5].tolist())


def test_worst_rows_of_classes_and_pairs_by_hand(three: Predictions) -> None:
    pairs = Dataset.from_dict({"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"]})
    _, rows = worst_rows(three, pairs, NAMES)
    assert [row[:4] for row in rows] == [
        [2, "c | f", "good", "größer"],
        [1, "b | e", "größer", "good"],
        [0, "a | d", "bad", "bad"],
    ]
    assert [row[4] for row in rows] == pytest.approx([-np.log(p) for p in (0.01, 0.3, 0.9)], rel=1e-6)


def test_calibration_error_by_hand() -> None:
    """Of 15 bins, the tenth holds 0.61 right and 0.65 wrong, the fourteenth 0.9 right, the last one 1.0 wrong."""
    confident = [0.61, 0.65, 0.9, 1 - 1e-12]
    predictions = from_probabilities([[p, 1 - p] for p in confident], [0, 1, 0, 1])
    expected = (abs(0.61 + 0.65 - 1) + abs(0.9 - 1) + abs(1 - 0)) / 4
    assert expected_calibration_error(predictions) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_is_small_if_and_only_if_confidence_is_accuracy() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    labels = (rng.random(20_000) > confidence).astype(int).tolist()
    calibrated = np.stack([confidence, 1 - confidence], axis=1)
    overconfident = np.stack([np.full(20_000, 0.99), np.full(20_000, 0.01)], axis=1)
    assert expected_calibration_error(from_probabilities(calibrated.tolist(), labels)) < 0.02
    assert expected_calibration_error(from_probabilities(overconfident.tolist(), labels)) == pytest.approx(
        0.24, abs=0.02
    )


@pytest.mark.parametrize(
    "predictions",
    [*(class_predictions(100, classes) for classes in (2, 3, 31)), number_predictions(50), label_predictions(50)],
    ids=["2 classes", "3 classes", "31 classes", "numbers", "labels"],
)
@pytest.mark.parametrize("broken", [None, np.nan, np.inf])
def test_picture_is_a_png_also_of_logits_that_are_not_finite(
    tmp_path: Path, predictions: Predictions, broken: float | None
) -> None:
    if broken is not None:
        predictions = predictions.take(np.arange(50))
        predictions.logits[3] = broken
    names = [f"name {index}" for index in range(predictions.logits.shape[1])]
    predictions = dataclasses.replace(predictions, temperature=1.5)
    assert draw(predictions, build_tables(predictions, names), names, "a title", tmp_path) == []
    wanted = picture_names(predictions.problem_type, len(names))
    assert {path.name for path in tmp_path.iterdir()} == {*wanted}
    for name in wanted:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n"), name


@pytest.mark.parametrize("make", [class_predictions, label_predictions], ids=["classes", "labels"])
def test_predictions_file_of_many_classes_has_the_largest_probabilities(tmp_path: Path, make: Any) -> None:
    predictions = make(30, 300)
    texts, names = Dataset.from_dict({"text": ["x"] * 30}), [f"class {number}" for number in range(300)]
    write_predictions(tmp_path / "predictions.jsonl", predictions, texts, names)
    for row, probabilities in zip(lines(tmp_path), predictions.probabilities, strict=True):
        best = np.argsort(-probabilities)[:20]
        assert row["probabilities"] == {names[place]: round(float(probabilities[place]), 6) for place in best}


@pytest.mark.parametrize("make", [class_predictions, label_predictions], ids=["classes", "labels"])
def test_probabilities_in_blocks_are_those_of_all_at_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = make(50, 7)
    whole = (predictions.predicted, predictions.probabilities)
    monkeypatch.setattr("lib.evaluation.predictions.BLOCK", 20)
    assert np.array_equal(predictions.predicted, whole[0])
    assert np.array_equal(np.concatenate([block.probabilities for block in predictions.blocks()]), whole[1])
    assert len(list(predictions.blocks())) == 25
    if make is label_predictions:
        assert np.array_equal(np.stack([predictions.probabilities_of(label) for label in range(7)], axis=1), whole[1])


def test_report_of_hundreds_of_classes_is_short_and_its_file_whole(tmp_path: Path) -> None:
    predictions, names = class_predictions(900, 300), [f"class number {number}" for number in range(300)]
    data = Data("made up", {"test": Dataset.from_dict({"text": ["x"] * 900})}, {}, {}, names, ("text",), ())
    text = write_report(tmp_path, "test", Scored(compute_metrics(predictions, []), predictions), {}, data)
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert len(text) < 10_000
    assert "20 of 300" in text
    assert "20 largest probabilities" in text
    assert str(tmp_path / "report.json") in text
    assert [row["class"] for row in record["classes"]] == names
    assert sum(row["samples"] for row in record["confusions"]) == (predictions.labels != predictions.predicted).sum()
