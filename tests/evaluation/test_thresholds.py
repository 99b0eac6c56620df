"""Thresholds of several labels: the best there are on validation, kept with the model, and never touched by test."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import f1_score

from lib.config.sections import MULTI_LABEL
from lib.evaluation.predictions import Predictions
from lib.evaluation.thresholds import restore_thresholds, store_thresholds, stored_thresholds, tune_thresholds


def predictions(probabilities: np.ndarray, labels: np.ndarray) -> Predictions:
    logits = logit(probabilities).astype(np.float32)
    return Predictions(logits, labels, np.zeros(len(labels)), problem_type=MULTI_LABEL)


def random_predictions(samples: int, seed: int) -> Predictions:
    """Rounded, so that probabilities are equal here and there."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((samples, 3)) < (0.1, 0.4, 0.8)).astype(np.int64)
    return predictions(expit(np.round(rng.normal(size=labels.shape) + labels - 1, 1)), labels)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_better_f1(seed: int) -> None:
    made = random_predictions(40, seed)
    for scores, gold, threshold in zip(made.probabilities.T, made.labels.T, tune_thresholds(made), strict=True):
        ours = f1_score(gold, scores >= threshold, zero_division=0)
        others = [f1_score(gold, scores >= other, zero_division=0) for other in np.linspace(0, 1, 997)]
        assert ours >= max(others) - 1e-12
        assert 0 < threshold < 1
        assert threshold not in scores


def test_of_equally_good_thresholds_the_nearest_to_one_half_is_taken() -> None:
    gold = np.array([[1], [0], [0]])
    assert tune_thresholds(predictions(np.array([[0.9], [0.3], [0.2]]), gold)) == pytest.approx([0.6], abs=1e-6)
    # Giving the label to one row or to all three has the same F1 for the second of these.
    assert tune_thresholds(predictions(np.array([[0.2], [0.15], [0.1]]), gold)) == pytest.approx([0.175], abs=1e-6)


def test_a_label_that_no_row_has_keeps_one_half() -> None:
    made = predictions(np.full((4, 2), 0.3), np.array([[0, 1]] * 4))
    assert tune_thresholds(made).tolist() == [0.5, pytest.approx(0.15)]


def test_numbers_that_are_not_finite_keep_one_half() -> None:
    made = random_predictions(9, 0)
    made.logits[0] = np.nan
    assert tune_thresholds(made).tolist() == [0.5] * 3


def test_thresholds_travel_with_the_configuration(tmp_path: Path) -> None:
    from transformers import AutoConfig, RobertaConfig

    settings = RobertaConfig(num_labels=2)
    assert stored_thresholds(settings) is None
    store_thresholds(settings, np.array([0.1, 1 / 3]))
    settings.save_pretrained(tmp_path)
    loaded = stored_thresholds(AutoConfig.from_pretrained(tmp_path))
    assert loaded is not None
    assert loaded.tolist() == [0.1, 1 / 3]
    other = SimpleNamespace()
    restore_thresholds(other, tmp_path)
    assert other.thresholds == [0.1, 1 / 3]


def test_a_model_without_thresholds_gives_none_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_labels": 2}))
    other = SimpleNamespace()
    restore_thresholds(other, tmp_path)
    assert stored_thresholds(other) is None
