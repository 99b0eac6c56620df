"""Linear models of vectors: logistic regression, one for each label of multi-label data, or ridge regression of numbers.

The problems are convex, so that there is one solution, which scikit-learn finds.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lib.config.sections import MULTI_LABEL, REGRESSION
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import LOWER_IS_BETTER, compute_metrics
from lib.model.losses import PLAIN

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Of the mean loss in units of the penalty, half the sum of squared weights of standardized vectors, from strong to weak."""

MOST_ITERATIONS = 300
NEVER = 20.0
"""The logit of a class or label that no training row has is this far below 0."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """outputs = vectors @ weight.T + bias; `weight` (outputs, size) and `bias` (outputs,) are float64."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """float32 (rows, outputs): the logits, or the numbers."""
        return (vectors.astype(np.float64) @ self.weight.T + self.bias).astype(np.float32)


def fit_linear(
    vectors: np.ndarray,
    labels: np.ndarray,
    problem_type: str,
    outputs: int,
    weights: np.ndarray | None = None,
    intercept: bool = True,
) -> Iterator[Linear]:
    """The linear model of each of `STRENGTHS`: of scikit-learn, on standardized vectors, which are part of its weights.

    `weights` (rows,) are those of the samples. Without `intercept`, vectors are scaled only, and the bias is 0.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(with_mean=intercept)
    given = scaler.fit_transform(vectors.astype(np.float64))
    total = len(labels) if weights is None else float(weights.sum(dtype=np.float64))
    columns = labels.T if problem_type == MULTI_LABEL else [labels]
    models = [
        Ridge(fit_intercept=intercept)
        if problem_type == REGRESSION
        else LogisticRegression(max_iter=MOST_ITERATIONS, fit_intercept=intercept, warm_start=True)
        for _ in columns
    ]
    for strength in STRENGTHS:
        weight, bias = np.zeros((outputs, vectors.shape[1])), np.full(outputs, -NEVER if intercept else 0.0)
        for place, (model, column) in enumerate(zip(models, columns, strict=True)):
            seen = np.unique(column)
            if problem_type == REGRESSION:
                model.set_params(alpha=total / strength).fit(given, column.astype(np.float64))
                weight[0], bias[0] = model.coef_, model.intercept_
            elif len(seen) == 1:  # nothing to tell apart
                if problem_type != MULTI_LABEL:
                    bias[int(seen[0])] = 0.0
                elif seen[0]:
                    bias[place] *= -1
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a solution that further iterations would change a little
                    model.set_params(C=strength / total).fit(given, column.astype(np.int64), weights)
                if problem_type == MULTI_LABEL:
                    weight[place], bias[place] = model.coef_[0], model.intercept_[0] if intercept else 0.0
                elif len(seen) == 2:  # the logit of the second class is that of both against each other
                    halves = np.array([-0.5, 0.5])
                    weight[seen], bias[seen] = halves[:, None] * model.coef_, halves * model.intercept_
                else:
                    weight[seen], bias[seen] = model.coef_, model.intercept_
        weight /= scaler.scale_
        yield Linear(weight, bias - weight @ scaler.mean_ if intercept else bias)


def predictions_of(outputs: np.ndarray, labels: np.ndarray, problem_type: str) -> Predictions:
    """Logits or numbers as predictions, with the losses of a model that has these outputs."""
    gold = labels.astype(np.float32 if problem_type == REGRESSION else np.int64)  # a copy, which PyTorch may have
    outputs = outputs.astype(np.float32, copy=False)
    losses = PLAIN[problem_type](torch.from_numpy(outputs), torch.from_numpy(gold)).numpy()
    return Predictions(outputs, gold, losses, problem_type=problem_type)


def choose_best(found: Sequence[Predictions], metric: str) -> tuple[int, float]:
    """The place of the predictions with the best value of a metric, the first of equal ones, and the value, higher if better.

    A value that is not defined is the worst.
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    names = [] if metric == "loss" else [metric]
    values = [sign * np.nan_to_num(compute_metrics(one, names)[metric], nan=-sign * 1e9) for one in found]
    best = int(np.argmax(values))
    return best, float(values[best])
