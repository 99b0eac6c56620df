"""Bootstrap intervals against formulas, resampling by hand, and the metrics themselves."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.evaluation import intervals
from lib.evaluation.intervals import Counts, bootstrap_intervals, draw_counts, row_scorer, score_counts
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import AVERAGED, compute_metrics, load_metric, metric_input, metric_settings
from lib.evaluation.tables import confusion_matrix
from tests.evaluation.samples import class_predictions, label_predictions, number_predictions

AVERAGED_NAMES = [f"{name}_{average}" for name in AVERAGED for average in ("macro", "micro", "weighted")]


@pytest.mark.parametrize(
    ("predictions", "metrics"),
    [
        (class_predictions(50), ["accuracy", "f1_macro", "matthews_correlation"]),
        (class_predictions(500), ["accuracy", "f1_macro", "matthews_correlation"]),
        (number_predictions(80), ["spearman", "mse", "mae", "r2"]),
        (label_predictions(80), ["average_precision", "f1_micro"]),
    ],
    ids=["few", "many", "numbers", "labels"],
)
def test_intervals_cover_scores_and_depend_on_the_seed_alone(predictions: Predictions, metrics: list[str]) -> None:
    first, again, other = (bootstrap_intervals(predictions, metrics, 100, seed) for seed in (1, 1, 2))
    scores = compute_metrics(predictions, metrics)
    assert first == again
    assert first["loss"] != other["loss"]
    assert set(first) == set(scores)
    for name, (low, high) in first.items():
        assert low < scores[name] < high, name


def test_interval_of_accuracy_is_as_wide_as_the_normal_one() -> None:
    predictions = class_predictions(2000)
    accuracy = compute_metrics(predictions, ["accuracy"])["accuracy"]
    low, high = bootstrap_intervals(predictions, ["accuracy"], 1000, seed=0)["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(accuracy * (1 - accuracy) / 2000), rel=0.15)
    assert 0.1 < accuracy < 0.9


def test_interval_of_loss_is_as_wide_as_the_normal_one() -> None:
    predictions = class_predictions(2000)
    low, high = bootstrap_intervals(predictions, [], 1000, seed=0)["loss"]
    assert high - low == pytest.approx(2 * 1.96 * predictions.losses.std() / np.sqrt(2000), rel=0.15)


def test_interval_of_correlation_is_that_of_fisher() -> None:
    predictions = number_predictions(400)
    value = compute_metrics(predictions, ["pearson"])["pearson"]
    expected = np.tanh(np.arctanh(value) + np.array([-1.96, 1.96]) / np.sqrt(400 - 3))
    assert bootstrap_intervals(predictions, ["pearson"], 1000, seed=0)["pearson"] == pytest.approx(expected, abs=0.01)


def test_drawing_confusion_matrices_equals_resampling_rows() -> None:
    predictions, rng = class_predictions(300), np.random.default_rng(0)
    resampled = [
        compute_metrics(predictions.take(rng.integers(300, size=300)), ["f1_macro"])["f1_macro"] for _ in range(300)
    ]
    interval = bootstrap_intervals(predictions, ["f1_macro"], 1000, seed=0)["f1_macro"]
    assert interval == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.015)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("classes", [2, 4])
def test_scores_of_confusion_matrices_equal_the_metrics(classes: int) -> None:
    rng = np.random.default_rng(3)
    counts = rng.multinomial(40, rng.dirichlet(np.full(classes**2, 0.3)), size=20).reshape(20, classes, classes)
    counts[0], counts[1, :, 1:] = np.diag(counts[0].diagonal()), 0  # nothing wrong; one class predicted only
    counts[:, 0, 0] += 1
    cells = gold, predicted = np.indices((classes, classes)).reshape(2, -1)
    names = ["accuracy", "matthews_correlation", "cohen_kappa", *AVERAGED_NAMES]
    for name in [*names, *(AVERAGED if classes == 2 else [])]:
        module, settings = metric_settings(name, classes)
        compute = load_metric(module)._compute
        expected = [compute(predicted.repeat(c), gold.repeat(c), **settings)[module] for c in map(np.ravel, counts)]
        found = score_counts(module, Counts(cells, counts.reshape(20, -1), classes), settings)
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=name)


def test_scores_of_resampled_labels_equal_the_metrics() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 3)).astype(np.float32), (rng.random((30, 3)) < 0.4).astype(np.int64)
    labels[:, 2] = 0
    predictions = Predictions(logits, labels, np.zeros(30, dtype=np.float32), problem_type=MULTI_LABEL)
    rows = rng.integers(30, size=(20, 30))
    logits[:5] = 0.0  # equal probabilities
    names = ["average_precision", "average_precision_weighted", "accuracy", "f1_samples", *AVERAGED_NAMES]
    for name in names:
        module, settings = metric_settings(name, 3, MULTI_LABEL)
        compute = load_metric(module, MULTI_LABEL)._compute
        given = metric_input(module, predictions)
        expected = [compute(given[row], labels[row], **settings)[module] for row in rows]
        found = row_scorer(module, predictions, settings)(rows)
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("make", [class_predictions, number_predictions, label_predictions])
def test_intervals_do_not_depend_on_how_many_resamples_are_drawn_at_once(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = make(60)
    names = {CLASSIFICATION: ["f1_macro"], REGRESSION: ["mse"], MULTI_LABEL: ["f1_macro", "accuracy"]}
    whole = bootstrap_intervals(predictions, names[predictions.problem_type], 50)
    monkeypatch.setattr(intervals, "CHUNK", 200)
    assert bootstrap_intervals(predictions, names[predictions.problem_type], 50) == whole


def test_matrices_without_their_empty_cells_are_those_of_whole_matrices() -> None:
    predictions = class_predictions(40, classes=9)
    matrix = confusion_matrix(predictions)
    wanted = np.random.default_rng(5).multinomial(40, matrix.ravel() / 40, size=30)
    (drawn,) = draw_counts(predictions, 30, np.random.default_rng(5))
    found = np.zeros_like(wanted)
    found[:, drawn.cells[0] * 9 + drawn.cells[1]] = drawn.drawn
    assert (matrix == 0).any()
    assert np.array_equal(found, wanted)


def test_intervals_of_thousands_of_classes_take_little_memory() -> None:
    predictions = class_predictions(4000, classes=3000, skill=5.0)
    tracemalloc.start()
    bootstrap_intervals(predictions, ["accuracy", "f1_macro", "cohen_kappa", "matthews_correlation"], 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_average_precision_of_many_labels_has_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, drawn = label_predictions(30), []
    monkeypatch.setattr(intervals, "WORK", 0)
    monkeypatch.setattr(intervals, "FEWEST", 7)
    monkeypatch.setattr(intervals, "percentiles", lambda values: drawn.append(len(values)))
    bootstrap_intervals(predictions, ["average_precision", "f1_macro"], 50)
    assert drawn == [50, 7, 50]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_undefined_score_has_an_interval_of_nan() -> None:
    one_class = Predictions(np.float32([[1, 0]] * 3), np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.float32))
    assert np.isnan(bootstrap_intervals(one_class, ["cohen_kappa"], 20)["cohen_kappa"]).all()
    constant = Predictions(np.ones((4, 1), np.float32), np.float32([1, 2, 3, 4]), np.zeros(4), problem_type=REGRESSION)
    assert np.isnan(bootstrap_intervals(constant, ["pearson"], 20)["pearson"]).all()
