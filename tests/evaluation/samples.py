"""Random predictions of each problem type, right more often than not."""

import numpy as np

from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.evaluation.predictions import Predictions


def class_predictions(samples: int, classes: int = 3, skill: float = 1.0, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples)
    logits = rng.normal(size=(samples, classes)) + skill * np.eye(classes)[labels]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(samples), labels]
    return Predictions(logits.astype(np.float32), labels, losses.astype(np.float32))


def number_predictions(samples: int, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=samples).astype(np.float32)
    predicted = (gold + 0.5 * rng.normal(size=samples)).astype(np.float32)
    return Predictions(predicted[:, None], gold, (predicted - gold) ** 2, problem_type=REGRESSION)


def label_predictions(samples: int, labels: int = 3, seed: int = 0) -> Predictions:
    """A rare label, one that half of the samples have, a frequent one, and again, each with its threshold."""
    rng = np.random.default_rng(seed)
    gold = (rng.random((samples, labels)) < np.resize((0.1, 0.5, 0.8), labels)).astype(np.int64)
    logits = (rng.normal(size=gold.shape) + 2 * gold - 1).astype(np.float32)
    losses = (np.logaddexp(0, logits) - gold * logits).mean(axis=1).astype(np.float32)
    return Predictions(logits, gold, losses, problem_type=MULTI_LABEL, thresholds=np.resize([0.3, 0.5, 0.6], labels))


def from_probabilities(probabilities: list[list[float]], labels: list[int]) -> Predictions:
    """Predictions of classes with these probabilities."""
    table = np.array(probabilities)
    losses = -np.log(table[np.arange(len(labels)), labels])
    return Predictions(np.log(table).astype(np.float32), np.array(labels), losses.astype(np.float32))
