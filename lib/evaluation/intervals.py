"""95 % intervals of scores by the bootstrap: how much a score would vary with other samples."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lib.config.sections import CLASSIFICATION, MULTI_LABEL
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import AVERAGED, is_finite, load_metric, metric_input, metric_settings

Interval = tuple[float, float]
CHUNK = 2**21
"""Numbers that are drawn at once, at most: memory does not grow with samples and classes."""
WORK = 2**32
"""Products of resamples, samples and labels: where average precision would need more, it gets fewer resamples."""
FEWEST = 100


def bootstrap_intervals(
    predictions: Predictions, metrics: Sequence[str], resamples: int = 1000, seed: int = 42
) -> dict[str, Interval]:
    """95 % percentile interval of the loss and of each metric (Efron and Tibshirani 1993), by name.

    Thresholds are not tuned again. NaN where a score is not defined. Average precision of thousands of labels is
    computed for as many resamples as WORK allows, and for FEWEST at least.
    """
    rng = np.random.default_rng(seed)
    size, problem = len(predictions.labels), predictions.problem_type
    settings = {name: metric_settings(name, predictions.logits.shape[1], problem) for name in metrics}
    values: dict[str, list[Any]] = {name: [] for name in metrics}
    if problem == CLASSIFICATION:
        for drawn in draw_counts(predictions, resamples, rng):
            for name, (module, options) in settings.items():
                values[name].extend(score_counts(module, drawn, options))
    losses = [rng.choice(predictions.losses, size).mean(dtype=np.float64) for _ in range(resamples)]
    if problem != CLASSIFICATION:
        score = {name: row_scorer(module, predictions, options) for name, (module, options) in settings.items()}
        work = max(FEWEST, WORK // max(1, predictions.logits.size))
        for done, rows in draw_rows(size, resamples, rng):
            for name in metrics:
                some = rows[: max(0, work - done)] if settings[name][0] == "average_precision" else rows
                values[name].extend(score[name](some) if len(some) else [])
    return {"loss": percentiles(losses)} | {name: percentiles(values[name]) for name in metrics}


@dataclasses.dataclass(frozen=True)
class Counts:
    """Confusion matrices of resampled rows, without their empty cells."""

    cells: np.ndarray
    """int64 (2, cells): gold and predicted class of each cell."""
    drawn: np.ndarray
    """int64 (resamples, cells): samples in each cell."""
    classes: int

    def sums(self, kept: np.ndarray) -> np.ndarray:
        """Counts by class, int64 (resamples, classes), where cell i is counted for the class `kept[i]`; -1: for none."""
        from scipy.sparse import csr_array

        some = np.flatnonzero(kept >= 0)
        ones = np.ones(len(some), dtype=np.int64)
        table = csr_array((ones, (kept[some], some)), shape=(self.classes, len(kept)))
        return np.ascontiguousarray((table @ self.drawn.T).T)


def draw_counts(predictions: Predictions, resamples: int, rng: np.random.Generator) -> Iterator[Counts]:
    """Confusion matrices of resampled rows, some resamples at a time.

    Metrics of classes depend on the matrix alone, and resampling rows with replacement draws its cells from a multinomial
    distribution: the cost does not grow with the number of rows. Empty cells stay empty and take no random number, so
    that they are left out; but for the last one, which ends the draw of the whole matrix as well.
    """
    classes, size = predictions.logits.shape[1], len(predictions.labels)
    cells, counts = np.unique(predictions.labels * classes + predictions.predicted, return_counts=True)
    if cells[-1] != classes**2 - 1:
        cells, counts = np.append(cells, classes**2 - 1), np.append(counts, 0)
    for _, number in chunks(resamples, max(len(cells), classes)):
        drawn = rng.multinomial(size, counts / size, size=number)
        yield Counts(np.stack(np.divmod(cells, classes)), drawn, classes)


def draw_rows(size: int, resamples: int, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    """Resamples done before, and the next choices of rows, int64 (resamples, samples)."""
    for done, number in chunks(resamples, size):
        yield done, rng.integers(size, size=(number, size))


def chunks(resamples: int, numbers: int) -> Iterator[tuple[int, int]]:
    """First resample and number of resamples of each chunk, where a resample has so many numbers."""
    step = max(1, CHUNK // numbers)
    for done in range(0, resamples, step):
        yield done, min(step, resamples - done)


def score_counts(module: str, counts: Counts, settings: dict[str, Any]) -> Sequence[float] | np.ndarray:
    """A metric of each confusion matrix, equal to scikit-learn's.

    Our own metrics are computed on all matrices at once: a call for each would take longer than the predictions did.
    """
    true, guessed = counts.cells
    hits = counts.sums(np.where(true == guessed, true, -1))
    gold, predicted = counts.sums(true), counts.sums(guessed)
    total = gold.sum(axis=1)
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
    compute = load_metric(module)._compute
    drawn = [(row > 0, row) for row in counts.drawn]
    return [compute(guessed[some], true[some], sample_weight=row[some], **settings)[module] for some, row in drawn]


def row_scorer(module: str, predictions: Predictions, settings: dict[str, Any]) -> Any:
    """A function from choices of rows (resamples, samples) to a metric of each: regression and multi-label."""
    labels, multi_label = predictions.labels, predictions.problem_type == MULTI_LABEL
    average = settings.get("average", "")
    if not is_finite(module, predictions):
        return lambda rows: [np.nan]
    if module == "average_precision" and average in ("macro", "weighted"):
        return lambda rows: average_precision(predictions, rows, average)
    given = metric_input(module, predictions)
    if module in AVERAGED and average != "samples":
        return lambda rows: average_classes(module, *label_counts(given, labels, rows), average)
    if multi_label and module == "accuracy":
        right = (given == labels).all(axis=1)
        return lambda rows: right[rows].mean(axis=1)
    compute = load_metric(module, predictions.problem_type)._compute
    if average == "samples":  # the mean of what each sample has
        own = np.array([compute(given[i : i + 1], labels[i : i + 1], **settings)[module] for i in range(len(labels))])
        return lambda rows: own[rows].mean(axis=1)
    return lambda rows: [compute(given[row], labels[row], **settings)[module] for row in rows]


def times_drawn(rows: np.ndarray) -> np.ndarray:
    """How often each choice of rows has each sample, float64 (resamples, samples): products of it use fast kernels."""
    return np.stack([np.bincount(row, minlength=rows.shape[1]) for row in rows]).astype(np.float64)


def label_counts(given: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits, gold and predicted samples of each label in each choice of rows, int64 (resamples, labels)."""
    times, (size, outputs) = times_drawn(rows), labels.shape
    sums = np.zeros((3, len(rows), outputs), dtype=np.int64)
    step = max(1, CHUNK // size)
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        found, gold = given[:, part].astype(np.float64), labels[:, part].astype(np.float64)
        sums[:, :, part] = np.stack([times @ (found * gold), times @ gold, times @ found])
    return sums[0], sums[1], sums[2]


def average_precision(predictions: Predictions, rows: np.ndarray, average: str) -> np.ndarray:
    """Average precision of each choice of rows, (resamples,): the mean over labels, or weighted by their samples.

    A sample that is drawn twice has twice the weight: each label is sorted once for all choices. A label without a sample
    counts 0, as in scikit-learn.
    """
    times = times_drawn(rows).T
    total, weights = np.zeros(len(rows)), np.zeros(len(rows))
    for label, gold in enumerate(predictions.labels.T):
        scores = predictions.probabilities_of(label)
        order = np.argsort(-scores, kind="stable")
        gold = gold[order] > 0
        if not gold.any():
            continue
        # Samples of equal scores are found together: at the last one of each.
        last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
        # Recall rises only where there is a gold sample.
        steps = last[np.unique(np.searchsorted(last, np.flatnonzero(gold)))]
        starts = np.concatenate([[0], steps[:-1] + 1])
        drawn = times[order[: steps[-1] + 1]]
        found = np.add.reduceat(drawn, starts).cumsum(axis=0)
        drawn[~gold[: steps[-1] + 1]] = 0
        hits = np.add.reduceat(drawn, starts)
        precision = ratio(hits.cumsum(axis=0), found)
        samples = hits.sum(axis=0)
        value = ratio((hits * precision).sum(axis=0), samples)
        weight = samples if average == "weighted" else 1.0
        total += value * weight
        weights += weight
    return ratio(total, weights if average == "weighted" else np.full(len(rows), float(predictions.labels.shape[1])))


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
