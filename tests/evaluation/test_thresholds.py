"""Multi-label thresholds are the best on validation, and are kept with the model."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import f1_score

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.errors import UserError
from lib.evaluation.predictions import Predictions
from lib.evaluation.thresholds import (
    choose_thresholds,
    store_thresholds,
    stored_thresholds,
    tune_thresholds,
)
from tests.evaluation.samples import class_predictions


def predictions_of(probabilities: np.ndarray, labels: np.ndarray) -> Predictions:
    logits = logit(probabilities).astype(np.float32)
    return Predictions(logits, labels, np.zeros(len(labels)), problem_type=MULTI_LABEL)


def random_predictions(samples: int, seed: int) -> Predictions:
    """Rounded, so that some probabilities are equal."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((samples, 3)) < (0.1, 0.4, 0.8)).astype(np.int64)
    return predictions_of(expit(np.round(rng.normal(size=labels.shape) + labels - 1, 1)), labels)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_better_f1(seed: int) -> None:
    made = random_predictions(40, seed)
    others = np.linspace(0, 1, 997)
    for scores, gold, threshold in zip(made.probabilities.T, made.labels.T, tune_thresholds(made), strict=True):
        best = f1_score(gold, scores >= threshold, zero_division=0)
        columns = np.tile(gold[:, None], len(others))
        assert best >= f1_score(columns, scores[:, None] >= others, average=None, zero_division=0).max() - 1e-12
        assert 0 < threshold < 1
        assert threshold not in scores


def test_nearest_to_one_half_of_equally_good_thresholds_is_taken() -> None:
    gold = np.array([[1], [0], [0]])
    assert tune_thresholds(predictions_of(np.array([[0.9], [0.3], [0.2]]), gold)) == pytest.approx([0.6], abs=1e-6)
    # Predicting the label for the first row alone has the best F1.
    assert tune_thresholds(predictions_of(np.array([[0.2], [0.15], [0.1]]), gold)) == pytest.approx([0.175], abs=1e-6)


def test_label_that_no_row_has_gets_one_half() -> None:
    made = predictions_of(np.full((4, 2), 0.3), np.array([[0, 1]] * 4))
    assert tune_thresholds(made).tolist() == [0.5, pytest.approx(0.15)]


def test_label_with_a_nan_gets_one_half() -> None:
    made = random_predictions(9, 0)
    made.logits[0] = np.nan
    assert tune_thresholds(made).tolist() == [0.5] * 3


@pytest.mark.parametrize("seed", range(5))
def test_threshold_of_two_classes_has_the_best_f1_of_the_second(seed: int) -> None:
    made = dataclasses.replace(class_predictions(40, 2, seed=seed), temperature=2.0)
    tuned = dataclasses.replace(made, thresholds=tune_thresholds(made))
    assert tuned.thresholds.sum() == pytest.approx(1)
    second = made.probabilities[:, 1]
    others = second[:, None] >= np.linspace(0, 1, 997)
    reached = f1_score(np.tile(made.labels[:, None], 997), others, average=None, zero_division=0)
    assert f1_score(made.labels, tuned.predicted) >= reached.max() - 1e-12
    assert np.array_equal(tuned.predicted, second >= tuned.thresholds[1])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["0.3"], [0.3, 0.3, 0.3]),
        (["mild=0.25"], [0.1, 0.25, 0.9]),
        (["0.4", "=x=0.2", "0=1"], [1, 0.4, 0.2]),
        ([], None),
    ],
)
def test_thresholds_of_labels_are_chosen_by_name_or_number(given: list[str], wanted: list[float] | None) -> None:
    names, stored = ["toxic", "mild", "=x"], np.array([0.1, 0.5, 0.9])
    found = choose_thresholds(given, MULTI_LABEL, names, stored)
    assert (None if found is None else found.tolist()) == wanted
    assert stored.tolist() == [0.1, 0.5, 0.9]
    if given == ["mild=0.25"]:
        plain = choose_thresholds(given, MULTI_LABEL, names, None)
        assert plain is not None
        assert plain.tolist() == [0.5, 0.25, 0.5]


@pytest.mark.parametrize("given", ["0.3", "good=0.3", "bad=0.7", "1=0.3"])
def test_threshold_of_two_classes_is_that_of_the_second_or_the_named_one(given: str) -> None:
    found = choose_thresholds([given], CLASSIFICATION, ["bad", "good"], None)
    assert found == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize(
    ("given", "problem", "names", "words"),
    [
        (["x=0.3"], MULTI_LABEL, ["a", "b"], ("x", "a, b")),
        (["a=0.3", "0=0.4"], MULTI_LABEL, ["a", "b"], ("twice",)),
        (["0.3"], CLASSIFICATION, ["a", "b", "c"], ("3 classes",)),
        (["0.3", "a=0.5"], CLASSIFICATION, ["a", "b"], ("two classes",)),
        (["a=0.3", "b=0.5"], CLASSIFICATION, ["a", "b"], ("two classes",)),
        (["0.3"], REGRESSION, ["stars"], ("regression",)),
    ],
)
def test_threshold_that_does_not_fit_is_refused(
    given: list[str], problem: str, names: list[str], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as refused:
        choose_thresholds(given, problem, names, None)
    assert all(word in str(refused.value) for word in ("--threshold", *words))


def test_thresholds_are_saved_with_the_model_configuration(tmp_path: Path) -> None:
    from transformers import AutoConfig, RobertaConfig

    settings = RobertaConfig(num_labels=2)
    assert stored_thresholds(settings) is None
    store_thresholds(settings, np.array([0.1, 1 / 3]))
    settings.save_pretrained(tmp_path)
    loaded = stored_thresholds(AutoConfig.from_pretrained(tmp_path))
    assert loaded is not None
    assert loaded.tolist() == [0.1, 1 / 3]
