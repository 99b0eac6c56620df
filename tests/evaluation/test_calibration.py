"""The temperature is the best one on validation, changes no answer, and is kept with the model; abstaining by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from lib.config.sections import MULTI_LABEL
from lib.evaluation.calibration import (
    COVERAGES,
    coverage_table,
    cross_entropy,
    expected_calibration_error,
    fit_temperature,
    store_temperature,
    stored_temperature,
)
from lib.evaluation.predictions import Predictions
from lib.evaluation.thresholds import tune_thresholds
from lib.model.losses import PLAIN
from tests.evaluation.samples import class_predictions, from_probabilities, label_predictions


class Given(ClassifierMixin, BaseEstimator):
    """A classifier whose decision function is its input."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.classes_ = np.arange(classes)

    def fit(self, table: np.ndarray, labels: np.ndarray) -> "Given":
        return self

    def decision_function(self, table: np.ndarray) -> np.ndarray:
        return table[:, 0] if self.classes == 2 else table

    def predict(self, table: np.ndarray) -> np.ndarray:
        return (table[:, 0] > 0).astype(int) if self.classes == 2 else table.argmax(axis=1)


def of_scikit_learn(decisions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Its calibrated probabilities of the same rows."""
    frozen = FrozenEstimator(Given(classes))
    return (
        CalibratedClassifierCV(frozen, method="temperature", ensemble=False)
        .fit(decisions, labels)
        .predict_proba(decisions)
    )


def scaled(predictions: Predictions, factor: float) -> Predictions:
    """The same with logits that are too large or too small."""
    return dataclasses.replace(predictions, logits=predictions.logits * np.float32(factor))


def at(predictions: Predictions, temperature: float) -> Predictions:
    return dataclasses.replace(predictions, temperature=temperature)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("factor", [0.05, 1, 6])
def test_temperature_is_that_of_scikit_learn(classes: int, factor: float) -> None:
    predictions = scaled(class_predictions(300, classes), factor)
    calibrated = at(predictions, fit_temperature(predictions))
    decisions = predictions.logits.astype(np.float64)
    if classes == 2:  # scikit-learn makes logits (-x, x) of a decision x
        decisions = (decisions[:, 1:] - decisions[:, :1]) / 2
    wanted = of_scikit_learn(decisions, predictions.labels, classes)
    assert calibrated.probabilities == pytest.approx(wanted, abs=1e-6)
    assert calibrated.temperature != 1


@pytest.mark.parametrize("factor", [0.2, 4])
def test_temperature_of_labels_is_that_of_all_their_cells(factor: float) -> None:
    predictions = scaled(label_predictions(200), factor)
    calibrated = at(predictions, fit_temperature(predictions))
    cells = predictions.logits.astype(np.float64).reshape(-1, 1) / 2
    wanted = of_scikit_learn(cells, predictions.labels.ravel(), 2)[:, 1]
    assert calibrated.probabilities.ravel() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("make", [class_predictions, label_predictions])
@pytest.mark.parametrize("seed", range(20))
def test_temperature_never_makes_the_loss_worse_and_no_other_one_is_better(make: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predictions = scaled(
        make(int(rng.integers(3, 60)), int(rng.integers(2, 6)), seed=seed), float(np.exp(rng.normal()))
    )
    temperature = fit_temperature(predictions)
    loss = cross_entropy(at(predictions, temperature))
    assert loss <= cross_entropy(predictions)
    if temperature != 1:
        others = [cross_entropy(at(predictions, temperature * factor)) for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2)]
        assert loss < min(others)


@pytest.mark.parametrize("make", [class_predictions, label_predictions])
@pytest.mark.parametrize("factor", [0.3, 5])
def test_temperature_changes_no_answer(make: Any, factor: float) -> None:
    """Thresholds are tuned to the same answers with a temperature as without one."""
    predictions = scaled(make(400), factor)
    calibrated = at(predictions, fit_temperature(predictions))
    assert calibrated.temperature not in (None, 1)
    if make is label_predictions:
        predictions, calibrated = (
            dataclasses.replace(found, thresholds=tune_thresholds(found)) for found in (predictions, calibrated)
        )
        assert calibrated.thresholds != pytest.approx(predictions.thresholds, abs=1e-3)
    assert np.array_equal(calibrated.predicted, predictions.predicted)
    assert calibrated.probabilities != pytest.approx(predictions.probabilities, abs=1e-3)


@pytest.mark.parametrize("make", [class_predictions, label_predictions])
def test_loss_without_a_temperature_is_that_of_evaluation(make: Any) -> None:
    predictions = make(50)
    assert cross_entropy(predictions) == pytest.approx(predictions.losses.mean(), rel=1e-5)
    assert np.array_equal(at(predictions, 1.0).probabilities, predictions.probabilities)


def soft(predictions: Predictions, seed: int) -> Predictions:
    """The same samples with probabilities as labels."""
    rng = np.random.default_rng(seed)
    if predictions.problem_type == MULTI_LABEL:
        targets = rng.random(predictions.logits.shape)
        return dataclasses.replace(predictions, targets=targets, labels=(targets >= 0.5).astype(np.int64))
    targets = rng.dirichlet(np.full(predictions.logits.shape[1], 0.7), len(predictions.labels))
    return dataclasses.replace(predictions, targets=targets, labels=targets.argmax(axis=1))


@pytest.mark.parametrize("make", [class_predictions, label_predictions])
@pytest.mark.parametrize("seed", range(10))
def test_temperature_of_soft_labels_has_the_least_soft_loss(make: Any, seed: int) -> None:
    """The loss is that of PyTorch; the labels follow the logits a little, so that some logits are too large."""
    rng = np.random.default_rng(seed)
    predictions = soft(make(60, int(rng.integers(2, 5)), seed=seed), seed)
    predictions = dataclasses.replace(predictions, logits=np.float32(predictions.logits + 3 * predictions.targets))
    predictions = scaled(predictions, float(np.exp(rng.normal())))
    kind = PLAIN[predictions.problem_type]

    def loss(temperature: float) -> float:
        logits, targets = torch.from_numpy(predictions.logits).double(), torch.from_numpy(predictions.targets)
        found = kind(logits / temperature, targets).mean().item()
        assert cross_entropy(at(predictions, temperature)) == pytest.approx(found, rel=1e-6)
        return found

    temperature = fit_temperature(predictions)
    assert temperature != 1
    assert loss(temperature) <= loss(1)
    assert loss(temperature) < min(loss(temperature * factor) for factor in (0.5, 0.9, 1.1, 2))


@pytest.mark.parametrize("make", [class_predictions, label_predictions])
def test_certain_soft_labels_have_the_temperature_and_loss_of_hard_ones(make: Any) -> None:
    hard = make(60)
    targets = np.eye(3)[hard.labels] if make is class_predictions else hard.labels.astype(np.float64)
    certain = dataclasses.replace(hard, targets=targets)
    assert fit_temperature(certain) == fit_temperature(hard)
    assert cross_entropy(at(certain, 2.0)) == cross_entropy(at(hard, 2.0))


def test_too_sure_model_gets_a_smaller_calibration_error() -> None:
    predictions = scaled(class_predictions(5000, skill=2.0), 5)
    calibrated = at(predictions, fit_temperature(predictions))
    assert expected_calibration_error(predictions) > 0.07
    assert expected_calibration_error(calibrated) < 0.03


def degenerate() -> dict[str, Predictions]:
    gold, one = np.array([0, 1, 1, 0]), np.array([1, 1, 1, 1])
    right, labels = np.eye(2, dtype=np.float32)[gold] * 3, np.array([[1, 0], [0, 1], [1, 1]])
    nothing = np.zeros(4, np.float32)
    broken, endless = right.copy(), right.copy()
    broken[2], endless[1, 0] = np.nan, np.inf
    signs = (2 * labels - 1).astype(np.float32)
    found = {
        "all right": Predictions(right, gold, nothing),
        "all right, by little": Predictions(right * np.float32(1e-6), gold, nothing),
        "all wrong": Predictions(-right, gold, nothing),
        "one class": Predictions(right, one, nothing),
        "NaN": Predictions(broken, gold, nothing),
        "infinite": Predictions(endless, gold, nothing),
        "equal logits": Predictions(np.ones_like(right), gold, nothing),
        "a tie": Predictions(np.array([[3, 0], [1, 1]], np.float32), np.array([0, 1]), nothing[:2]),
    }
    for name, logits, given in (
        ("labels all right", signs, labels),
        ("labels all wrong", -signs, labels),
        ("every label everywhere", signs, np.ones_like(labels)),
        ("no label anywhere", signs, np.zeros_like(labels)),
        ("labels without logits", 0 * signs, labels),
    ):
        found[name] = Predictions(logits, given, nothing[:3], problem_type=MULTI_LABEL)
    return found


@pytest.mark.parametrize("name", degenerate())
def test_samples_without_a_best_temperature_give_one(name: str) -> None:
    with np.errstate(all="raise"):
        assert fit_temperature(degenerate()[name]) == 1


def test_temperature_grows_with_the_logits() -> None:
    predictions = class_predictions(200)
    once = fit_temperature(predictions)
    assert fit_temperature(scaled(predictions, 8)) == pytest.approx(8 * once, rel=1e-6)


def test_temperature_in_blocks_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (class_predictions, label_predictions):
        predictions = make(50, 7)
        whole = (fit_temperature(predictions), cross_entropy(predictions), coverage_table(class_predictions(50, 7)))
        monkeypatch.setattr("lib.evaluation.predictions.BLOCK", 20)
        again = (fit_temperature(predictions), cross_entropy(predictions), coverage_table(class_predictions(50, 7)))
        assert again[:2] == pytest.approx(whole[:2])
        assert again[2] == whole[2]
        monkeypatch.undo()


def test_temperature_is_saved_with_the_model_configuration(tmp_path: Path) -> None:
    from transformers import AutoConfig, RobertaConfig

    settings = RobertaConfig(num_labels=2)
    assert stored_temperature(settings) is None
    store_temperature(settings, 4 / 3)
    settings.save_pretrained(tmp_path)
    assert stored_temperature(AutoConfig.from_pretrained(tmp_path)) == 4 / 3


@pytest.mark.parametrize("classes", [2, 5])
def test_coverage_is_what_abstaining_below_the_probability_leaves(classes: int) -> None:
    predictions = at(class_predictions(333, classes), 0.7)
    rows = coverage_table(predictions)
    confidence, right = predictions.probabilities.max(axis=1), predictions.predicted == predictions.labels
    for row in rows:
        kept = confidence >= row["abstain_below"]
        assert (row["samples"], row["coverage"]) == (kept.sum(), kept.mean())
        assert row["accuracy"] == right[kept].mean()
        assert row["abstain_below"] == round(row["abstain_below"], 4)
    assert (rows[0]["abstain_below"], rows[0]["coverage"]) == (0, 1)
    assert [row["coverage"] for row in rows] == pytest.approx(COVERAGES, abs=0.02)
    assert all(row["coverage"] >= share for row, share in zip(rows, COVERAGES, strict=True))


def test_coverage_counts_the_probability_of_what_a_threshold_predicts() -> None:
    made = from_probabilities([[0.6, 0.4], [0.45, 0.55], [0.2, 0.8]], [0, 1, 1])
    rows = coverage_table(dataclasses.replace(made, thresholds=np.array([0.7, 0.3])))
    assert [row["abstain_below"] for row in rows] == pytest.approx([0, 0.55, 0.8], abs=2e-4)
    assert [row["samples"] for row in rows] == [3, 2, 1]
    assert [row["accuracy"] for row in rows] == pytest.approx([2 / 3, 1, 1])


def test_equal_probabilities_are_kept_or_left_together() -> None:
    assert [row["samples"] for row in coverage_table(from_probabilities([[0.75, 0.25]] * 9, [0] * 9))] == [9]
