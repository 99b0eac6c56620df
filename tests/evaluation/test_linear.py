"""Linear models of vectors: scikit-learn's solutions, as weights of an ordinary linear layer, for every problem type."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.evaluation.linear import MOST_ITERATIONS, STRENGTHS, choose_best, fit_linear, predictions_of


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(60, 5)) * [1, 2, 10, 0.1, 1] + [0, 50, 0, 1, -3]).astype(np.float32)


def classes_of(vectors, number):
    scores = vectors[:, :number] / vectors[:, :number].std(axis=0)
    return (scores - scores.mean(axis=0) + np.random.default_rng(1).normal(size=scores.shape)).argmax(axis=1)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_classes_have_the_probabilities_of_scikit_learn(vectors, number, weighted):
    labels = classes_of(vectors, number)
    weights = np.where(labels == 1, 3.0, 1.0).astype(np.float32) if weighted else None
    given = StandardScaler().fit_transform(vectors.astype(np.float64))
    found = list(fit_linear(vectors, labels, CLASSIFICATION, number, weights))
    for strength, solution in zip(STRENGTHS, found, strict=True):
        total = 60 if weights is None else weights.sum()
        model = LogisticRegression(C=strength / total, max_iter=MOST_ITERATIONS).fit(given, labels, weights)
        np.testing.assert_allclose(softmax(solution(vectors), axis=1), model.predict_proba(given), atol=2e-3)
    losses = [log_loss(labels, softmax(solution(vectors), axis=1), sample_weight=weights) for solution in found]
    assert losses == sorted(losses, reverse=True)


def test_labels_are_separate_regressions_and_one_that_all_rows_have_or_lack_is_certain(vectors):
    first = classes_of(vectors, 2)
    labels = np.stack([first, np.ones(60), np.zeros(60)], axis=1).astype(np.float32)
    given = StandardScaler().fit_transform(vectors.astype(np.float64))
    for strength, solution in zip(STRENGTHS, fit_linear(vectors, labels, MULTI_LABEL, 3), strict=True):
        model = LogisticRegression(C=strength / 60, max_iter=MOST_ITERATIONS).fit(given, first)
        probabilities = expit(solution(vectors))
        np.testing.assert_allclose(probabilities[:, 0], model.predict_proba(given)[:, 1], atol=2e-3)
        assert (probabilities[:, 1] > 0.999).all()
        assert (probabilities[:, 2] < 0.001).all()


def test_numbers_are_those_of_ridge_regression(vectors):
    labels = (vectors[:, 0] * 3 + 100).astype(np.float32)
    given = StandardScaler().fit_transform(vectors.astype(np.float64))
    for strength, solution in zip(STRENGTHS, fit_linear(vectors, labels, REGRESSION, 1), strict=True):
        model = Ridge(alpha=60 / strength).fit(given, labels)
        np.testing.assert_allclose(solution(vectors)[:, 0], model.predict(given), rtol=1e-5)


def test_layer_without_a_bias_gets_none_and_a_class_without_rows_is_not_predicted(vectors):
    labels = classes_of(vectors, 3)
    for solution in fit_linear(vectors, labels, CLASSIFICATION, 3, intercept=False):
        assert not solution.bias.any()
    missing = np.where(labels == 2, 3, labels)
    for solution in fit_linear(vectors, missing, CLASSIFICATION, 4):
        assert (solution(vectors).argmax(axis=1) != 2).all()


def test_best_predictions_have_the_best_defined_value_the_first_of_equal_ones():
    labels = np.array([0.0, 1.0, 2.0], dtype=np.float32)
    outputs = ([[5.0], [5.0], [5.0]], [[0.0], [1.0], [2.5]], [[0.0], [1.0], [2.5]])
    found = [predictions_of(np.array(rows, dtype=np.float32), labels, REGRESSION) for rows in outputs]
    for metric in ("pearson", "mse", "loss"):  # the correlation of equal numbers is not defined
        number, value = choose_best(found, metric)
        assert number == 1
        assert value == pytest.approx(0.99, abs=0.01) if metric == "pearson" else value == pytest.approx(-0.25 / 3)
