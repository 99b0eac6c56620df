"""95 % intervals of scores by the bootstrap: how much a score would vary with other samples."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.config.sections import CLASSIFICATION
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import AVERAGED, load_metric, metric_input, metric_settings
from lib.evaluation.tables import confusion_matrix

Interval = tuple[float, float]


def bootstrap_intervals(
    predictions: Predictions, metrics: Sequence[str], resamples: int = 1000, seed: int = 42
) -> dict[str, Interval]:
    """95 % percentile interval of the loss and of each metric (Efron and Tibshirani 1993), by name.

    Thresholds are not tuned again. NaN where a score is not defined.
    """
    rng = np.random.default_rng(seed)
    size, problem = len(predictions.labels), predictions.problem_type
    by_class = problem == CLASSIFICATION
    if by_class:
        resampled = draw_counts(predictions, resamples, rng)
    losses = [rng.choice(predictions.losses, size).mean(dtype=np.float64) for _ in range(resamples)]
    if not by_class:
        resampled = rng.integers(size, size=(resamples, size))
    intervals = {"loss": percentiles(losses)}
    for name in metrics:
        module, settings = metric_settings(name, predictions.logits.shape[1], problem)
        if by_class:
            intervals[name] = percentiles(score_counts(module, resampled, settings))
        else:
            intervals[name] = percentiles(score_rows(module, resampled, predictions, settings))
    return intervals


def draw_counts(predictions: Predictions, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Confusion matrices of resampled rows, int64 (resamples, gold, predicted).

    Metrics of classes depend on the matrix alone, and resampling rows with replacement draws its cells from a multinomial
    distribution: the cost does not grow with the number of rows.
    """
    matrix, size = confusion_matrix(predictions), len(predictions.labels)
    return rng.multinomial(size, matrix.ravel() / size, size=resamples).reshape(resamples, *matrix.shape)


def score_counts(module: str, counts: np.ndarray, settings: dict[str, Any]) -> Sequence[float] | np.ndarray:
    """A metric of each confusion matrix in `counts` (resamples, gold, predicted), equal to scikit-learn's.

    Our own metrics are computed on all matrices at once: a call for each would take longer than the predictions did.
    """
    hits, gold, predicted = counts.diagonal(axis1=1, axis2=2), counts.sum(axis=2), counts.sum(axis=1)
    total = counts.sum(axis=(1, 2))
    if module == "accuracy":
        return hits.sum(axis=1) / total
    if module in AVERAGED:
        return average_classes(module, hits, gold, predicted, settings["average"])
    chance = (gold * predicted).sum(axis=1)
    if module == "matthews_correlation":
        spread = [total.astype(float) ** 2 - (side.astype(float) ** 2).sum(axis=1) for side in (gold, predicted)]
        return ratio(hits.sum(axis=1) * total - chance, np.sqrt(spread[0] * spread[1]))
    if module == "cohen_kappa":
        return ratio(hits.sum(axis=1) * total - chance, total**2 - chance, undefined=np.nan)
    compute, cells = load_metric(module)._compute, np.indices(counts.shape[1:]).reshape(2, -1)
    drawn = [(row > 0, row) for row in counts.reshape(len(counts), -1)]
    return [compute(cells[1][some], cells[0][some], sample_weight=row[some], **settings)[module] for some, row in drawn]


def score_rows(
    module: str, rows: np.ndarray, predictions: Predictions, settings: dict[str, Any]
) -> Sequence[float] | np.ndarray:
    """A metric of each choice of `rows` (resamples, samples): regression and multi-label."""
    given, labels = metric_input(module, predictions), predictions.labels
    if not np.isfinite(given).all():
        return [np.nan]
    if module in AVERAGED and settings["average"] != "samples":
        times = np.stack([np.bincount(row, minlength=len(labels)) for row in rows])
        return average_classes(module, times @ (given * labels), times @ labels, times @ given, settings["average"])
    compute = load_metric(module, predictions.problem_type)._compute
    return [compute(given[row], labels[row], **settings)[module] for row in rows]


def average_classes(module: str, hits: np.ndarray, gold: np.ndarray, predicted: np.ndarray, average: str) -> np.ndarray:
    """f1, precision or recall (resamples,) from counts (resamples, classes); 0 where it is not defined."""
    above, below = {"f1": (2 * hits, gold + predicted), "precision": (hits, predicted), "recall": (hits, gold)}[module]
    if average == "micro":
        return ratio(above.sum(axis=1), below.sum(axis=1))
    values = ratio(above, below)
    if average == "weighted":
        return ratio((values * gold).sum(axis=1), gold.sum(axis=1))
    return values[:, -1] if average == "binary" else values.mean(axis=1)


def ratio(a: np.ndarray, b: np.ndarray, undefined: float = 0.0) -> np.ndarray:
    """a / b, and `undefined` where b is zero."""
    return np.divide(a, b, out=np.full(np.shape(a), undefined), where=b > 0)


def percentiles(values: Sequence[float] | np.ndarray) -> Interval:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN: the interval is NaN
        low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
