"""The comparison of groups of runs: scores with intervals, differences with p values, answers that changed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.config.compare import CompareConfig
from lib.config.sections import CLASSIFICATION, MULTI_LABEL
from lib.errors import UserError
from lib.evaluation.intervals import average_classes
from lib.evaluation.scores import AVERAGED, check_metrics, load_metric, metric_settings
from lib.experiments.groups import Group, Scored, majority
from lib.experiments.significance import (
    Difference,
    Score,
    adjust_for_several,
    exact_mcnemar,
    multi_bootstrap,
    paired_bootstrap,
    two_way,
)

SAMPLE_SCORES = ("accuracy", "mse", "mae")
"""Metrics that are means over samples."""


@dataclasses.dataclass(frozen=True)
class GroupScore:
    """A metric of one group: each seed's value, their mean with a 95 % interval, and that of the ensemble of the seeds.

    `ensemble` is the score of the seeds as one, see the function `ensemble`. NaN for one seed.
    """

    seeds: tuple[float, ...]
    low: float
    high: float
    ensemble: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.seeds))

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; NaN for one seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else math.nan


@dataclasses.dataclass(frozen=True)
class MetricComparison:
    """One metric of all groups, and the difference of each but the first to the first.

    `adjusted` are the p values after correction for several differences (`differences` has the uncorrected ones).
    """

    metric: str
    groups: tuple[GroupScore, ...]
    differences: tuple[Difference, ...]
    adjusted: tuple[float, ...]


def compare_groups(groups: Sequence[Group], config: CompareConfig) -> list[MetricComparison]:
    """All metrics of all groups. Raises UserError for a metric that is unknown or does not fit the data."""
    first = groups[0].scored[0]
    names = config.metrics or usual_metrics(groups[0], config.split)
    check_metrics(names, len(first.names), first.problem_type)
    return [compare_metric(groups, name, config) for name in names]


def usual_metrics(group: Group, split: str) -> tuple[str, ...]:
    """The metrics that the run's results.json has for the split, or for its other splits, without the loss."""
    keys = [key.split("/", 1) for key in group.runs[0].results if "/" in key]
    by_split: dict[str, list[str]] = {}
    for place, name in keys:
        if name != "loss" and not place.startswith("run"):
            by_split.setdefault(place, []).append(name)
    return tuple(by_split.get("eval" if split == "validation" else split) or next(iter(by_split.values())))


def compare_metric(groups: Sequence[Group], metric: str, config: CompareConfig) -> MetricComparison:
    """One metric of all groups, and its differences to the first group."""
    size, scored = len(groups[0].scored[0].texts), []
    for group in groups:
        scores = [weighted_score(run, metric) for run in group.scored]
        once = np.ones((1, size), dtype=np.int64)
        values = tuple(float(score(once)[0]) for score in scores)
        spread = multi_bootstrap([lambda times: np.zeros(len(times))], scores, size, config.resamples, config.seed)
        whole = float(weighted_score(ensemble(group.scored), metric)(once)[0]) if len(scores) > 1 else math.nan
        scored.append(GroupScore(values, spread.low, spread.high, whole))
    differences = [difference(groups[0].scored, group.scored, metric, config) for group in groups[1:]]
    return MetricComparison(
        metric, tuple(scored), tuple(differences), tuple(adjust_for_several([d.p for d in differences]))
    )


def difference(baseline: Sequence[Scored], other: Sequence[Scored], metric: str, config: CompareConfig) -> Difference:
    """The difference by the test that fits: see lib/experiments/significance.py and docs/experiments.md."""
    if metric not in SAMPLE_SCORES or (len(baseline) == 1) != (len(other) == 1):
        before, after = ([weighted_score(run, metric) for run in group] for group in (baseline, other))
        return multi_bootstrap(before, after, len(baseline[0].texts), config.resamples, config.seed)
    a, b = (np.stack([sample_scores(run, metric) for run in group]) for group in (baseline, other))
    if len(a) > 1:
        found = two_way(a, b)
        if metric == "accuracy":  # the t distribution knows no limits
            found = dataclasses.replace(found, low=max(found.low, -1.0), high=min(found.high, 1.0))
        return found
    found = paired_bootstrap(a[0], b[0], seed=config.seed)
    if metric != "accuracy":
        return found
    p = exact_mcnemar(a[0] > 0, b[0] > 0)
    return dataclasses.replace(found, p=p, method="exact McNemar, one seed")


def sample_scores(scored: Scored, metric: str) -> np.ndarray:
    """float64 (samples,): the scores whose mean is the metric, one of `SAMPLE_SCORES`."""
    gold, predicted = scored.gold, scored.predicted
    if metric == "accuracy":
        right = gold == predicted
        return (right.all(axis=1) if right.ndim == 2 else right).astype(np.float64)
    return (predicted - gold) ** 2 if metric == "mse" else np.abs(predicted - gold)


def weighted_score(scored: Scored, metric: str) -> Score:
    """The metric of a run as a function of how often each sample counts."""
    if metric in SAMPLE_SCORES:
        samples = sample_scores(scored, metric)
        return lambda times: times @ samples / times.sum(axis=1)
    module, settings = metric_settings(metric, max(1, len(scored.names)), scored.problem_type)
    gold, predicted = scored.gold, scored.predicted
    if module in AVERAGED and settings["average"] != "samples":
        if scored.problem_type == CLASSIFICATION:
            gold, predicted = (np.eye(len(scored.names), dtype=np.int64)[values] for values in (gold, predicted))
        hits, average = gold * predicted, settings["average"]
        return lambda times: average_classes(module, times @ hits, times @ gold, times @ predicted, average)
    compute = load_metric(module, scored.problem_type)._compute
    given = scored.probabilities if module == "average_precision" and scored.probabilities is not None else predicted
    if module == "average_precision" and np.isnan(given).any():
        raise UserError(
            f"--metrics {metric} ranks all probabilities, and predictions.jsonl has only the largest ones of so many "
            "labels; use another one, such as f1_micro"
        )

    def score(times: np.ndarray) -> np.ndarray:
        rows = (np.repeat(np.arange(len(row)), row) for row in times)
        return np.array([compute(given[row], gold[row], **settings)[module] for row in rows])

    return score


def ensemble(runs: Sequence[Scored]) -> Scored:
    """The runs as one: the mean of numbers, and the class of the largest mean probability.

    For two classes, and each label of several, the `majority` of their answers, which hold their tuned thresholds.
    """
    first = runs[0]
    if first.probabilities is None:
        return dataclasses.replace(first, predicted=np.mean([run.predicted for run in runs], axis=0))
    probabilities = np.mean([run.probabilities for run in runs if run.probabilities is not None], axis=0)
    if first.problem_type == MULTI_LABEL or len(first.names) == 2:
        share = probabilities if first.problem_type == MULTI_LABEL else probabilities[:, 1]
        votes = np.sum([run.predicted for run in runs], axis=0)
        predicted = majority(votes, share, len(runs)).astype(np.int64)
    else:
        predicted = probabilities.argmax(axis=1)
    return dataclasses.replace(first, predicted=predicted, probabilities=probabilities)


def changed_answers(baseline: Group, other: Group, limit: int) -> list[dict[str, Any]]:
    """The samples whose answers changed most, at most `limit`: the share of seeds that were right before and after.

    Of numbers: the mean absolute error before and after.
    """
    metric = "accuracy" if baseline.scored[0].probabilities is not None else "mae"
    before, after = (
        np.mean([sample_scores(run, metric) for run in group.scored], axis=0) for group in (baseline, other)
    )
    most = np.argsort(-np.abs(after - before), kind="stable")[:limit]
    name = "right" if metric == "accuracy" else "error"
    texts = baseline.scored[0].texts
    return [
        {"index": int(i), "text": texts[i], f"{name}_before": float(before[i]), f"{name}_after": float(after[i])}
        for i in most
        if before[i] != after[i]
    ]
