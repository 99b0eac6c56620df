"""Each metric equals scikit-learn's, without a network; what is no metric is refused."""

import socket
import time
from collections.abc import Callable

import numpy as np
import pytest
import sklearn.metrics as sk

from lib.config import UserError
from lib.evaluation import METRICS, Predictions, check_metrics, compute_metrics

MULTICLASS: dict[str, Callable[..., float]] = {
    "accuracy": sk.accuracy_score,
    "matthews_correlation": sk.matthews_corrcoef,
    "cohen_kappa": sk.cohen_kappa_score,
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


def test_every_metric_folder_is_covered_here() -> None:
    folders = {folder.name for folder in METRICS.iterdir() if folder.name[0] != "_"}
    assert folders == {*MULTICLASS, *AVERAGED}


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
    with pytest.raises(UserError, match=r"--metrics acuracy: not one of ours \(accuracy, cohen_kappa, f1, "):
        check_metrics(["accuracy", "acuracy"], 2)
    assert time.monotonic() - started < 5
