"""Thresholds: the probability at which each label, or the second of two classes, is predicted; kept with the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, words
from lib.data.load import Data
from lib.errors import UserError, printable
from lib.evaluation.predictions import DEFAULT_THRESHOLD, Predictions
from lib.runtime.screen import list_some

NAMES_LISTED = 20


def tune_thresholds(predictions: Predictions) -> np.ndarray:
    """The threshold with the best F1 for each label, or for the second of two classes, float64 (outputs,).

    A threshold lies halfway between two probabilities of the bare logits, strictly between 0 and 1, and is then moved to
    the temperature: what is predicted does not depend on that, unless a temperature near 0 rounds probabilities to exactly
    0 or 1, where they have no order. Of equally good ones the nearest to 0.5 is taken; a label that no row has, and one
    with a NaN, gets 0.5. Those of two classes have the sum 1.
    """
    bare, temperature = predictions.uncalibrated, predictions.temperature
    if predictions.problem_type == CLASSIFICATION:
        second = best_threshold(bare.probabilities_of(1), predictions.labels)
        second = float(at_temperature(np.array(second), temperature))
        return np.array([1 - second, second])
    columns = ((bare.probabilities_of(label), gold) for label, gold in enumerate(predictions.labels.T))
    return at_temperature(np.array([best_threshold(scores, gold) for scores, gold in columns]), temperature)


def at_temperature(thresholds: np.ndarray, temperature: float | None) -> np.ndarray:
    """Thresholds of probabilities without a temperature, as those with it."""
    from scipy.special import expit, logit

    return thresholds if temperature in (None, 1.0) else expit(logit(thresholds) / temperature)


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


def has_thresholds(problem_type: str | None, outputs: int) -> bool:
    """Whether labels, or two classes, are predicted from a threshold on; of more classes the most probable one is."""
    return problem_type == MULTI_LABEL or (problem_type == CLASSIFICATION and outputs == 2)


def check_tuned(threshold: str | None, data: Data) -> None:
    """Raise UserError for --threshold tuned in a training whose data have no two classes."""
    if threshold is None:
        return
    if data.problem_type == MULTI_LABEL:
        raise UserError("--threshold tuned is for two classes; thresholds of multi-label data are tuned without it")
    if not has_thresholds(data.problem_type, len(data.label_names)):
        raise UserError(f"--threshold tuned {unfit(data.problem_type, data.label_names)}")


def choose_thresholds(
    given: Sequence[str], problem_type: str | None, names: Sequence[str], stored: np.ndarray | None
) -> np.ndarray | None:
    """The thresholds of --threshold, float64 (outputs,); None without it.

    `given` holds a number for all labels, name=number for some, by name or number; the others are `stored`, else 0.5. A
    number is that of the second of two classes. Raises UserError where nothing is predicted from a threshold on, and for a
    name that is none of the labels.
    """
    if not given:
        return None
    shown = f"--threshold {printable(' '.join(given))}"
    if not has_thresholds(problem_type, len(names)):
        raise UserError(f"{shown} {unfit(problem_type, names)}")
    places = {str(place): place for place in range(len(names))} | {name: place for place, name in enumerate(names)}
    chosen: dict[int, float] = {}
    for item in (item for item in given if "=" in item):
        name, _, number = item.rpartition("=")
        if name not in places:
            listed = list_some(list(map(printable, names)), NAMES_LISTED)
            raise UserError(f"--threshold {printable(item)}: {printable(name)} is not among the labels: {listed}")
        if places[name] in chosen:
            raise UserError(f"{shown} names {printable(name)} twice")
        chosen[places[name]] = float(number)
    for_all = next((float(item) for item in given if "=" not in item), None)
    usual = np.full(len(names), DEFAULT_THRESHOLD) if stored is None else stored
    thresholds = usual.astype(np.float64) if for_all is None else np.full(len(names), for_all)
    thresholds[list(chosen)] = list(chosen.values())
    if problem_type == CLASSIFICATION:
        if len(chosen) + (for_all is not None) > 1:
            raise UserError(f"{shown}: of two classes one has a threshold, the other is predicted below it; name one")
        second = 1 - thresholds[0] if 0 in chosen else thresholds[1]
        return np.array([1 - second, second])
    return thresholds


def unfit(problem_type: str | None, names: Sequence[str]) -> str:
    """Why nothing is predicted from a threshold on."""
    if problem_type == REGRESSION:
        return f"is for two classes or multi-label data, this is {words(problem_type)}"
    return f"is for two classes or multi-label data; of {len(names)} classes the most probable one is predicted"


def stored_thresholds(config: Any) -> np.ndarray | None:
    """The thresholds in a model's configuration; None where it has none, as in models trained elsewhere."""
    stored = getattr(config, "thresholds", None)
    return None if stored is None else np.asarray(stored, dtype=np.float64)


def store_thresholds(config: Any, thresholds: np.ndarray) -> None:
    """Put thresholds into a model's configuration, which is saved with the model."""
    config.thresholds = [float(value) for value in thresholds]
