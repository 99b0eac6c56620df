"""How far a score could be from that of more samples: 95 % intervals by resampling."""

import warnings
from collections.abc import Sequence

import numpy as np

from lib.predictions import Predictions
from lib.problems import CLASSIFICATION
from lib.scores import METRICS, load_metric, metric_input, metric_settings
from lib.tables import confusion_matrix

Interval = tuple[float, float]


def bootstrap_intervals(
    predictions: Predictions, metrics: Sequence[str], resamples: int, seed: int
) -> dict[str, Interval]:
    """95 % percentile interval of the loss and of each metric of ours (Efron and Tibshirani 1993).

    Thresholds stay as they are. Raises nothing: a score that is not defined has an interval of NaN.
    """
    rng = np.random.default_rng(seed)
    size, problem = len(predictions.labels), predictions.problem_type
    by_class = problem == CLASSIFICATION
    draws = draw_counts(predictions, resamples, rng) if by_class else None
    losses = [rng.choice(predictions.losses, size).mean(dtype=np.float64) for _ in range(resamples)]
    rows = [] if by_class else [rng.integers(size, size=size) for _ in range(resamples)]
    intervals = {"loss": percentiles(losses)}
    for name in metrics:
        module, settings = metric_settings(name, predictions.logits.shape[1], problem)
        if not (METRICS / module).is_dir():
            continue
        compute = load_metric(module, problem)._compute
        if draws is not None:
            gold, predicted = np.divmod(np.arange(draws.shape[1]), predictions.logits.shape[1])
            values = [
                compute(predicted[row > 0], gold[row > 0], sample_weight=row[row > 0], **settings)[module]
                for row in draws
            ]
        else:
            given, labels = metric_input(module, predictions), predictions.labels
            finite = np.isfinite(given).all()
            values = [compute(given[row], labels[row], **settings)[module] for row in rows] if finite else [np.nan]
        intervals[name] = percentiles(values)
    return intervals


def draw_counts(predictions: Predictions, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Confusion matrices of resampled rows, int64 (resamples, classes squared).

    Metrics of classes depend on the matrix alone, and resampling samples with replacement is drawing its cells from a
    multinomial distribution: the cost does not grow with the number of samples.
    """
    counts = confusion_matrix(predictions.labels, predictions.predicted, predictions.logits.shape[1]).ravel()
    return rng.multinomial(len(predictions.labels), counts / len(predictions.labels), size=resamples)


def percentiles(values: Sequence[float]) -> Interval:
    with warnings.catch_warnings():  # of nothing but NaN: NaN says it
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
