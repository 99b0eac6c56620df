"""Each metric equals scikit-learn's or SciPy's, without a network; what is no metric is refused."""

import dataclasses
import socket
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy import stats

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.errors import UserError
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import DEFAULT_METRICS, FOLDER, METRICS, check_metrics, compute_metrics

MULTICLASS: dict[str, Callable[..., float]] = {
    "accuracy": sk.accuracy_score,
    "matthews_correlation": sk.matthews_corrcoef,
    "cohen_kappa": sk.cohen_kappa_score,
}
NUMBERS: dict[str, Callable[..., float]] = {
    "pearson": lambda a, b: stats.pearsonr(a, b).statistic,
    "spearman": lambda a, b: stats.spearmanr(a, b).statistic,
    "mse": sk.mean_squared_error,
    "mae": sk.mean_absolute_error,
    "r2": sk.r2_score,
}
AVERAGED = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score}


def random_predictions(samples: int, classes: int, seed: int = 0) -> Predictions:
    """Predictions that are right more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples)
    logits = rng.normal(size=(samples, classes)).astype(np.float32)
    logits[np.arange(samples), labels] += 1
    return Predictions(logits, labels, rng.exponential(size=samples).astype(np.float32))


def score(predictions: Predictions, name: str) -> float:
    return compute_metrics(predictions, [name])[name]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def silent_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are found and nothing answers."""

    def refuse(*_: object) -> None:
        raise ConnectionRefusedError("nothing answers in this test")

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", MULTICLASS)
def test_metric_equals_scikit_learn(name: str, classes: int, seed: int) -> None:
    predictions = random_predictions(101, classes, seed)
    expected = MULTICLASS[name](predictions.labels, predictions.predicted)
    assert score(predictions, name) == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_metric_equals_scikit_learn(name: str, average: str, classes: int) -> None:
    predictions = random_predictions(101, classes)
    expected = AVERAGED[name](predictions.labels, predictions.predicted, average=average)
    assert score(predictions, f"{name}_{average}") == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", AVERAGED)
def test_metric_of_two_classes_is_that_of_class_1(name: str) -> None:
    predictions = random_predictions(101, 2)
    assert score(predictions, name) == pytest.approx(
        AVERAGED[name](predictions.labels, predictions.predicted, pos_label=1)
    )


def test_every_metric_module_is_covered_here_and_has_its_problems() -> None:
    modules = {path.stem for path in FOLDER.glob("[!_]*.py")}
    assert modules == {*MULTICLASS, *AVERAGED, *NUMBERS, "average_precision"}
    assert modules == {name for names in METRICS.values() for name in names}


# ---------------------------------------------------------------------------------------------------- numbers


def number_predictions(samples: int, seed: int = 0) -> Predictions:
    """Ratings from 0 to 5 in steps of a half, so that many are equal, and predictions of one digit, many equal too."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(11, size=samples).astype(np.float32) / 2
    logits = np.round(labels + rng.normal(size=samples), 1).astype(np.float32)[:, None]
    return Predictions(logits, labels, (logits[:, 0] - labels) ** 2, problem_type=REGRESSION)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NUMBERS)
def test_metric_of_numbers_equals_scikit_learn_and_scipy_with_ties(name: str, seed: int) -> None:
    predictions = number_predictions(57, seed)
    assert len(set(predictions.labels.tolist())) < 57 > len(set(predictions.predicted.tolist()))
    expected = NUMBERS[name](predictions.labels.astype(float), predictions.predicted.astype(float))
    assert score(predictions, name) == pytest.approx(expected, abs=1e-12)


def test_spearman_with_ties_is_pearson_of_mean_ranks_by_hand() -> None:
    predictions = Predictions(np.float32([[2], [2], [5]]), np.float32([1, 3, 3]), np.zeros(3), problem_type=REGRESSION)
    ranks = ([1.5, 1.5, 3], [1, 2.5, 2.5])
    assert score(predictions, "spearman") == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_with_equal_predictions_is_not_a_number_and_no_warning(name: str) -> None:
    constant = Predictions(np.ones((4, 1), np.float32), np.float32([1, 2, 3, 4]), np.zeros(4), problem_type=REGRESSION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(score(constant, name))


def test_the_mean_loss_of_numbers_is_their_mean_squared_error() -> None:
    scores = compute_metrics(number_predictions(101), ["mse"])
    assert scores["loss"] == pytest.approx(scores["mse"], rel=1e-6)


# ---------------------------------------------------------------------------------------------------- several labels


def label_predictions(samples: int, labels: int = 4, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    gold = (rng.random((samples, labels)) < [0.1, 0.3, 0.5, 0.7][:labels]).astype(np.int64)
    logits = (rng.normal(size=gold.shape) + 1.5 * gold - 1).astype(np.float32)
    return Predictions(logits, gold, np.zeros(samples), problem_type=MULTI_LABEL, thresholds=np.full(labels, 0.4))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "samples"])
@pytest.mark.parametrize("name", AVERAGED)
def test_metric_of_several_labels_equals_scikit_learn(name: str, average: str) -> None:
    predictions = label_predictions(83)
    predicted = (1 / (1 + np.exp(-predictions.logits.astype(float))) >= 0.4).astype(int)
    expected = AVERAGED[name](predictions.labels, predicted, average=average, zero_division=0)
    assert score(predictions, f"{name}_{average}") == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "samples"])
def test_average_precision_equals_scikit_learn_whatever_the_thresholds(average: str) -> None:
    predictions = label_predictions(83)
    expected = sk.average_precision_score(predictions.labels, predictions.logits, average=average)
    assert score(predictions, f"average_precision_{average}") == pytest.approx(expected, abs=1e-12)
    if average == "macro":
        other = dataclasses.replace(predictions, thresholds=None)
        assert score(other, "average_precision") == pytest.approx(expected, abs=1e-12)


def test_accuracy_of_several_labels_asks_for_all_of_them() -> None:
    predictions = label_predictions(83)
    expected = (predictions.predicted == predictions.labels).all(axis=1).mean()
    assert score(predictions, "accuracy") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("f1_macro", REGRESSION),
        ("pearson", CLASSIFICATION),
        ("mse", MULTI_LABEL),
        ("average_precision", CLASSIFICATION),
    ],
)
def test_a_metric_of_another_problem_is_refused_with_those_that_fit(name: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"--metrics {name} is not for .*; use some of {METRICS[problem][0]}, "):
        check_metrics([name], 1 if problem == REGRESSION else 3, problem)


@pytest.mark.parametrize("make", [number_predictions, label_predictions])
def test_predictions_that_are_not_finite_have_no_score_and_no_traceback(make: Callable[..., Predictions]) -> None:
    broken = make(9)
    broken.logits[0] = np.nan
    for name in DEFAULT_METRICS[broken.problem_type]:
        if make is number_predictions or name == "average_precision":
            assert np.isnan(score(broken, name))


def test_macro_average_counts_a_class_that_is_never_seen_as_zero() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]]
    predictions = Predictions(logits, np.array([0, 0, 1, 1]), np.zeros(4, dtype=np.float32))
    assert score(predictions, "f1_macro") == pytest.approx(2 / 3)
    assert score(predictions, "accuracy") == 1


def test_loss_is_the_mean_over_samples() -> None:
    predictions = random_predictions(1001, 2)
    assert compute_metrics(predictions, [])["loss"] == pytest.approx(predictions.losses.astype(np.float64).mean())
    assert list(compute_metrics(predictions, ["f1_macro", "accuracy"])) == ["loss", "f1_macro", "accuracy"]


@pytest.mark.parametrize("name", AVERAGED)
def test_metric_of_two_classes_is_refused_for_three(name: str) -> None:
    with pytest.raises(UserError, match=f"--metrics {name} is for two classes, the data has 3; use {name}_macro"):
        check_metrics([name], 3)
    check_metrics([name, f"{name}_macro"], 2)


@pytest.mark.parametrize("network", ["no_network", "silent_network"])
def test_an_unknown_metric_is_refused_at_once(network: str, request: pytest.FixtureRequest) -> None:
    import evaluate  # noqa: F401  the import is not part of the time measured

    request.getfixturevalue(network)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"--metrics acuracy: not one of ours \(accuracy, average_precision, "):
        check_metrics(["accuracy", "acuracy"], 2)
    assert time.monotonic() - started < 5
