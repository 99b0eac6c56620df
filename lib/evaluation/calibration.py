"""Calibration: a temperature that makes probabilities say how often a model is right, and what is left where it abstains."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from lib.config.sections import MULTI_LABEL
from lib.evaluation.predictions import Predictions

KEY = "calibration_temperature"
"""The key in config.json. Configurations of decoders have a `temperature` of their own, for sampling."""
BINS = 15
MOST = 1e6
"""Of T and of 1 / T. Beyond them, logits say nothing at all, or are wrong by less than rounding."""
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25)
"""Shares of the samples that are kept, in the table of coverage and accuracy."""


def fit_temperature(predictions: Predictions) -> float:
    """The T with the least cross entropy of softmax(logits / T), for multi-label of the sigmoid, on these samples.

    With soft labels the cross entropy is that of their probabilities. T divides all logits, so that no class is predicted
    in place of another (Guo et al., ICML 2017). 1 where the samples have no best one: no mistake, one class only, no better
    than equal probabilities, a logit that is not finite.
    """
    from scipy.optimize import brentq  # not before something is tuned

    logits, labels = predictions.logits, predictions.labels
    unclear = not np.isfinite(logits).all() or len(np.unique(labels)) < 2

    def slope(beta: float) -> float:
        """The derivative of the summed cross entropy by beta = 1 / T, which only rises: it is convex in beta."""
        scaled = dataclasses.replace(predictions, temperature=1 / beta if beta else np.inf)
        rows = [(block.probabilities * block.logits).sum(axis=1) - of_gold(block) for block in scaled.blocks()]
        return float(np.concatenate(rows).sum())

    if unclear or not any(has_mistake(block) for block in predictions.blocks()) or slope(0.0) >= 0:
        return 1.0
    high = 1.0
    while slope(high) <= 0:
        high *= 2
        if high > MOST:
            return 1.0
    temperature = 1 / float(brentq(slope, 0.0, high, xtol=1e-12, rtol=1e-10))
    better = cross_entropy(dataclasses.replace(predictions, temperature=temperature)) < cross_entropy(predictions)
    return temperature if better and temperature <= MOST else 1.0


def of_gold(predictions: Predictions) -> np.ndarray:
    """The logit of each sample's class, or the sum of those of its labels; of soft labels weighted by them."""
    wanted = predictions.wanted
    return given_gold(predictions.logits, wanted) if wanted.ndim == 1 else (wanted * predictions.logits).sum(axis=1)


def has_mistake(predictions: Predictions) -> bool:
    """Whether a logit speaks for another class than the gold one, or against a label; of soft labels, not only for it."""
    if predictions.problem_type == MULTI_LABEL:
        return bool((np.maximum(predictions.logits, 0) > predictions.wanted * predictions.logits).any())
    return bool((predictions.logits.max(axis=1) > of_gold(predictions)).any())


def given_gold(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The column of each row's class."""
    return table[np.arange(len(table)), labels]


def cross_entropy(predictions: Predictions) -> float:
    """The mean loss at the temperature, in nats, as evaluation has it without one: of soft labels that of `targets`.

    Of multi-label it is averaged over labels.
    """
    from scipy.special import log_softmax

    total = 0.0
    for block in predictions.blocks():
        logits = block.logits.astype(np.float64) / (predictions.temperature or 1.0)
        if predictions.problem_type == MULTI_LABEL:
            total += float((np.logaddexp(0, logits) - logits * block.wanted).mean(axis=1).sum())
        else:
            total -= float(of_gold(dataclasses.replace(block, logits=log_softmax(logits, axis=1))).sum())
    return total / len(predictions.labels)


class Bins(NamedTuple):
    """Answers in 15 equal bins of their probability, each float64 (bins,): sums and counts."""

    gaps: np.ndarray
    """Probabilities less right answers."""
    probabilities: np.ndarray
    right: np.ndarray
    counts: np.ndarray
    unknown: int
    """Answers whose probability is NaN, in no bin."""


def bin_answers(predictions: Predictions) -> Bins:
    """The most probable class of each sample, right where it is the gold one; of multi-label each label of each sample."""
    sums, unknown = np.zeros((4, BINS)), 0
    for block in predictions.blocks():
        if predictions.problem_type == MULTI_LABEL:
            chances, right = block.probabilities.ravel(), block.labels.ravel() == 1
        else:
            chances, right = block.probabilities.max(axis=1), block.logits.argmax(axis=1) == block.labels
        known = ~np.isnan(chances)
        unknown += int((~known).sum())
        chances, right = chances[known], right[known]
        bins = np.minimum((chances * BINS).astype(int), BINS - 1)
        for total, weights in zip(sums, (chances - right, chances, right, None), strict=True):
            total += np.bincount(bins, weights=weights, minlength=BINS)
    gaps, probabilities, answers, counts = sums
    return Bins(gaps, probabilities, answers, counts, unknown)


def expected_calibration_error(predictions: Predictions) -> float:
    """Mean gap between probability and share of right answers over 15 equal bins (Guo et al., ICML 2017); NaN if a logit is."""
    bins = bin_answers(predictions)
    return float("nan") if bins.unknown else float(np.abs(bins.gaps).sum() / bins.counts.sum())


def coverage_table(predictions: Predictions) -> list[dict[str, Any]]:
    """What is left of the samples, and how much of it is right, where a model abstains below a probability.

    The probabilities, of what is predicted, have four digits, and keep at least the shares of COVERAGES. Empty if a logit
    is NaN (El-Yaniv and Wiener, JMLR 2010: risk and coverage).
    """
    predicted = predictions.predicted
    starts = np.cumsum([0, *(len(block.labels) for block in predictions.blocks())])
    parts = zip(predictions.blocks(), starts, strict=False)
    chances = [given_gold(block.probabilities, predicted[at : at + len(block.labels)]) for block, at in parts]
    chance, correct = np.concatenate(chances), predicted == predictions.labels
    if np.isnan(chance).any():
        return []
    ranked = np.sort(chance)[::-1]
    rows: list[dict[str, Any]] = []
    for share in COVERAGES:
        least = ranked[min(len(ranked), max(1, int(np.ceil(share * len(ranked))))) - 1]
        limit = 0.0 if share == 1 else float(np.floor(least * 10_000) / 10_000)
        kept = chance >= limit
        coverage = float(kept.mean())
        if not rows or coverage < rows[-1]["coverage"]:
            row = {"abstain_below": limit, "coverage": coverage, "accuracy": float(correct[kept].mean())}
            rows.append(row | {"samples": int(kept.sum())})
    return rows


def store_temperature(config: Any, temperature: float) -> None:
    """Put a temperature into a model's configuration, which is saved with the model."""
    setattr(config, KEY, float(temperature))


def stored_temperature(config: Any) -> float | None:
    """The temperature in a model's configuration; None where it has none, as in models trained elsewhere."""
    return getattr(config, KEY, None)
