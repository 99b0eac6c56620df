"""Multi-label thresholds: the probability at which each label is predicted, tuned on validation, kept with the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lib.evaluation.predictions import DEFAULT_THRESHOLD, Predictions


def tune_thresholds(predictions: Predictions) -> np.ndarray:
    """The threshold with the best F1 for each label, float64 (labels,), strictly between 0 and 1.

    A threshold lies halfway between two probabilities. Of equally good ones the nearest to 0.5 is taken; a label that
    no row has, and one with a NaN, gets 0.5.
    """
    columns = ((predictions.probabilities_of(label), gold) for label, gold in enumerate(predictions.labels.T))
    return np.array([best_threshold(scores, gold) for scores, gold in columns])


def best_threshold(scores: np.ndarray, gold: np.ndarray) -> float:
    """The threshold of one label, from its probabilities and gold labels, both (samples,)."""
    if not gold.any() or not np.isfinite(scores).all():
        return DEFAULT_THRESHOLD
    from sklearn.metrics import precision_recall_curve  # takes seconds to import

    precision, recall, values = precision_recall_curve(gold, scores)
    # The last point of the curve is above all probabilities; `values` rise.
    precision, recall = precision[:-1], recall[:-1]
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    # Any threshold above the previous value and up to this one predicts the same.
    halfway = (np.concatenate([[0.0], values[:-1]]) + values) / 2
    best = halfway[f1 >= f1.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - DEFAULT_THRESHOLD))])


def stored_thresholds(config: Any) -> np.ndarray | None:
    """The thresholds in a model's configuration; None where it has none, as in models trained elsewhere."""
    stored = getattr(config, "thresholds", None)
    return None if stored is None else np.asarray(stored, dtype=np.float64)


def store_thresholds(config: Any, thresholds: np.ndarray) -> None:
    """Put thresholds into a model's configuration, which is saved with the model."""
    config.thresholds = [float(value) for value in thresholds]


def restore_thresholds(config: Any, folder: Path) -> None:
    """Copy the thresholds of the model saved in `folder`, if it has any, into `config`."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("thresholds")
    if saved is not None:
        store_thresholds(config, saved)
