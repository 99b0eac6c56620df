"""From which probability on a label is given, where a row may have several: tuned on validation, kept with the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lib.evaluation.predictions import PLAIN_THRESHOLD, Predictions


def tune_thresholds(predictions: Predictions) -> np.ndarray:
    """For each label the threshold of the best F1, float64 (labels,), strictly between 0 and 1.

    Thresholds lie halfway between two probabilities; of equally good ones the nearest to 0.5 is taken, and 0.5 for a
    label that no row has.
    """
    columns = zip(predictions.probabilities.T, predictions.labels.T, strict=True)
    return np.array([best_threshold(scores, gold) for scores, gold in columns])


def best_threshold(scores: np.ndarray, gold: np.ndarray) -> float:
    """That of one label, from the probabilities of all rows and whether they have it."""
    if not gold.any() or not np.isfinite(scores).all():
        return PLAIN_THRESHOLD
    from sklearn.metrics import precision_recall_curve

    precision, recall, values = precision_recall_curve(gold, scores)
    # The last point of the curve gives no label at all; values rise.
    precision, recall = precision[:-1], recall[:-1]
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    below = np.concatenate([[0.0], values[:-1]])
    # Any threshold between `below` and `values` gives the same labels.
    halfway = (below + values) / 2
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(halfway[best[np.argmin(np.abs(halfway[best] - PLAIN_THRESHOLD))]])


def stored_thresholds(config: Any) -> np.ndarray | None:
    """Those that a model's configuration brings along; None when it has none, as models of others."""
    stored = getattr(config, "thresholds", None)
    return None if stored is None else np.asarray(stored, dtype=np.float64)


def store_thresholds(config: Any, thresholds: np.ndarray) -> None:
    """Put them into a model's configuration, which is saved with it."""
    config.thresholds = [float(value) for value in thresholds]


def restore_thresholds(config: Any, folder: Path) -> None:
    """Take over those that a saved model has, if any."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if saved.get("thresholds") is not None:
        store_thresholds(config, np.array(saved["thresholds"]))
