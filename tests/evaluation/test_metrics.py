"""Each metric equals scikit-learn's or SciPy's, without a network; unknown and unfitting metrics are refused."""

import dataclasses
import os
import socket
import sys
import time
import tracemalloc
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sklearn.metrics as sk
from datasets import Dataset
from scipy import stats
from scipy.special import expit

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, DataConfig
from lib.data.load import Data
from lib.errors import UserError
from lib.evaluation.predictions import Predictions
from lib.evaluation.scores import (
    DEFAULT_METRICS,
    FOLDER,
    METRICS,
    check_metrics,
    choose_metrics,
    compute_metrics,
    load_metric,
)
from tests.evaluation.samples import class_predictions, label_predictions, number_predictions

CLASSES: dict[str, Callable[..., float]] = {
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
    """Host names resolve, and no host answers."""

    def refuse(*_: object) -> None:
        raise ConnectionRefusedError("nothing answers in this test")

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_module_is_tested_here_and_fits_a_problem_type() -> None:
    modules = {path.stem for path in FOLDER.glob("[!_]*.py")}
    assert modules == {*CLASSES, *AVERAGED, *NUMBERS, "average_precision"}
    assert modules == {name for names in METRICS.values() for name in names}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", CLASSES)
def test_metric_of_classes_equals_scikit_learn(name: str, classes: int, seed: int) -> None:
    predictions = class_predictions(101, classes, seed=seed)
    expected = CLASSES[name](predictions.labels, predictions.predicted)
    assert score(predictions, name) == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_metric_equals_scikit_learn(name: str, average: str, classes: int) -> None:
    predictions = class_predictions(101, classes)
    expected = AVERAGED[name](predictions.labels, predictions.predicted, average=average)
    assert score(predictions, f"{name}_{average}") == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", AVERAGED)
def test_metric_of_two_classes_is_that_of_class_1(name: str) -> None:
    predictions = class_predictions(101, 2)
    expected = AVERAGED[name](predictions.labels, predictions.predicted, pos_label=1)
    assert score(predictions, name) == pytest.approx(expected)


def test_macro_average_counts_a_class_that_never_occurs_as_zero() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]]
    predictions = Predictions(logits, np.array([0, 0, 1, 1]), np.zeros(4, dtype=np.float32))
    assert score(predictions, "f1_macro") == pytest.approx(2 / 3)
    assert score(predictions, "accuracy") == 1


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NUMBERS)
def test_metric_of_numbers_equals_scikit_learn_and_scipy_with_ties(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(11, size=57).astype(np.float32) / 2
    logits = np.round(labels + rng.normal(size=57), 1).astype(np.float32)[:, None]
    predictions = Predictions(logits, labels, np.zeros(57), problem_type=REGRESSION)
    assert len(set(labels.tolist())) < 57 > len(set(predictions.predicted.tolist()))
    expected = NUMBERS[name](labels.astype(float), predictions.predicted.astype(float))
    assert score(predictions, name) == pytest.approx(expected, abs=1e-12)


def test_spearman_with_ties_is_pearson_of_mean_ranks_by_hand() -> None:
    predictions = Predictions(np.float32([[2], [2], [5]]), np.float32([1, 3, 3]), np.zeros(3), problem_type=REGRESSION)
    ranks = ([1.5, 1.5, 3], [1, 2.5, 2.5])
    assert score(predictions, "spearman") == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlation_with_equal_predictions_is_nan_without_a_warning(name: str) -> None:
    constant = Predictions(np.ones((4, 1), np.float32), np.float32([1, 2, 3, 4]), np.zeros(4), problem_type=REGRESSION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(score(constant, name))


@pytest.mark.parametrize("name", ["pearson", "spearman", "r2"])
def test_metric_that_needs_two_samples_is_nan_for_one(name: str) -> None:
    one = Predictions(np.ones((1, 1), np.float32), np.float32([2]), np.zeros(1), problem_type=REGRESSION)
    assert np.isnan(score(one, name))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "samples"])
@pytest.mark.parametrize("name", AVERAGED)
def test_multi_label_metric_equals_scikit_learn(name: str, average: str) -> None:
    predictions = label_predictions(83)
    predicted = (expit(predictions.logits.astype(float)) >= predictions.thresholds).astype(int)
    expected = AVERAGED[name](predictions.labels, predicted, average=average, zero_division=0)
    assert score(predictions, f"{name}_{average}") == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "samples"])
def test_average_precision_equals_scikit_learn_whatever_the_thresholds(average: str) -> None:
    predictions = label_predictions(83)
    expected = sk.average_precision_score(predictions.labels, predictions.logits, average=average)
    assert score(predictions, f"average_precision_{average}") == pytest.approx(expected, abs=1e-12)
    if average == "macro":
        untuned = dataclasses.replace(predictions, thresholds=None)
        assert score(untuned, "average_precision") == pytest.approx(expected, abs=1e-12)


def test_multi_label_accuracy_needs_all_labels_right() -> None:
    predictions = label_predictions(83)
    expected = (predictions.predicted == predictions.labels).all(axis=1).mean()
    assert score(predictions, "accuracy") == pytest.approx(expected)


def test_loss_is_the_mean_over_samples() -> None:
    predictions = class_predictions(1001, 2)
    assert compute_metrics(predictions, [])["loss"] == pytest.approx(predictions.losses.astype(np.float64).mean())
    assert list(compute_metrics(predictions, ["f1_macro", "accuracy"])) == ["loss", "f1_macro", "accuracy"]


def test_mean_loss_of_numbers_is_their_mean_squared_error() -> None:
    scores = compute_metrics(number_predictions(101), ["mse"])
    assert scores["loss"] == pytest.approx(scores["mse"], rel=1e-6)


@pytest.mark.parametrize("make", [number_predictions, label_predictions])
def test_predictions_that_are_not_finite_have_nan_scores(make: Callable[..., Predictions]) -> None:
    broken = make(9)
    broken.logits[0] = np.nan
    for name in DEFAULT_METRICS[broken.problem_type]:
        if make is number_predictions or name == "average_precision":
            assert np.isnan(score(broken, name))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_modules_load_by_path_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(os.path.relpath(FOLDER)) if relative else FOLDER
    ones = {"predictions": [1, 0, 1], "references": [1, 1, 1]}
    several = {"predictions": [[1, 0], [1, 1]], "references": [[1, 0], [0, 1]]}
    for module in METRICS[CLASSIFICATION]:
        assert list(evaluate.load(f"{folder}/{module}.py").compute(**ones)) == [module]
    for module in METRICS[MULTI_LABEL]:
        settings = {} if module == "accuracy" else {"average": "macro"}
        assert list(evaluate.load(f"{folder}/{module}.py", "multilabel").compute(**several, **settings)) == [module]
    for module in METRICS[REGRESSION]:
        metric = evaluate.load(f"{folder}/{module}.py")
        assert list(metric.compute(predictions=[0.5, 1], references=[1.5, 0])) == [module]


def data_of(problem_type: str, outputs: int) -> Data:
    names = [f"name {index}" for index in range(outputs)]
    return Data("made up", {}, {}, {}, names, ("text",), (), problem_type=problem_type)


def test_default_metrics_fit_the_problem_and_the_first_chooses_the_model() -> None:
    for problem, outputs in ((CLASSIFICATION, 2), (CLASSIFICATION, 5), (REGRESSION, 1), (MULTI_LABEL, 3)):
        chosen = choose_metrics(None, DataConfig(train_file="train.csv"), data_of(problem, outputs))
        assert chosen.names == DEFAULT_METRICS[problem]
        assert chosen.best == chosen.names[0]


@pytest.mark.parametrize("best", ["loss", "f1_macro", "eval/f1_macro", "eval_f1_macro"])
def test_model_is_chosen_by_loss_or_a_computed_metric(best: str) -> None:
    chosen = choose_metrics(("accuracy", "f1_macro"), DataConfig(), data_of(CLASSIFICATION, 3), best)
    assert chosen.names == ("accuracy", "f1_macro")
    assert chosen.best == best.removeprefix("eval").lstrip("/_")


def test_model_cannot_be_chosen_by_a_metric_that_is_not_computed() -> None:
    with pytest.raises(UserError, match=r"--metric_for_best_model recall_macro .*accuracy, f1_macro, loss"):
        choose_metrics(("accuracy", "f1_macro"), DataConfig(), data_of(CLASSIFICATION, 3), "recall_macro")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("f1_macro", REGRESSION),
        ("pearson", CLASSIFICATION),
        ("mse", MULTI_LABEL),
        ("average_precision", CLASSIFICATION),
    ],
)
def test_metric_of_another_problem_type_is_refused_with_those_that_fit(name: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"--metrics {name} .*{', '.join(METRICS[problem])}"):
        check_metrics([name], 1 if problem == REGRESSION else 3, problem)


@pytest.mark.parametrize("name", AVERAGED)
def test_metric_of_two_classes_is_refused_for_three(name: str) -> None:
    with pytest.raises(UserError, match=f"--metrics {name} .* 3; use {name}_macro"):
        check_metrics([name], 3)
    check_metrics([name, f"{name}_macro"], 2)


@pytest.mark.parametrize("network", ["no_network", "silent_network"])
def test_unknown_metric_is_refused_at_once_with_the_known_ones(network: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(network)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"--metrics acuracy: .*accuracy, average_precision, "):
        check_metrics(["accuracy", "acuracy"], 2)
    assert time.monotonic() - started < 5


HALF = np.array([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("metric", "problem", "labels", "found"),
    [
        ("pearson", REGRESSION, np.float32([0.5, 0.5]), "0.5"),
        ("spearman", REGRESSION, np.float32([3]), "3"),
        ("r2", REGRESSION, np.float32([2, 2, 2]), "2"),
        ("mse", REGRESSION, np.float32([2, 2, 2]), None),
        ("pearson", REGRESSION, np.float32([2, 3]), None),
        ("cohen_kappa", CLASSIFICATION, np.array([1, 1]), "name 1"),
        ("matthews_correlation", CLASSIFICATION, np.array([0]), "name 0"),
        ("f1", CLASSIFICATION, np.array([0, 0]), "name 1"),
        ("f1", CLASSIFICATION, np.array([1, 1]), None),
        ("f1_macro", CLASSIFICATION, np.array([0, 0]), None),
        ("accuracy", CLASSIFICATION, np.array([0, 0]), None),
        ("cohen_kappa", CLASSIFICATION, np.array([0, 1]), None),
        ("average_precision", MULTI_LABEL, np.zeros((3, 2), int), "no label"),
        ("average_precision", MULTI_LABEL, np.ones((3, 2), int), "no label"),
        ("average_precision", MULTI_LABEL, HALF, None),
        ("f1_micro", MULTI_LABEL, np.zeros((3, 2), int), "no row"),
        ("f1_micro", MULTI_LABEL, np.ones((3, 2), int), None),
    ],
)
def test_metric_that_validation_labels_leave_undefined_cannot_choose_the_model(
    metric: str, problem: str, labels: np.ndarray, found: str | None
) -> None:
    tokens = Dataset.from_dict({"labels": labels.tolist()})
    data = dataclasses.replace(data_of(problem, 2), tokens={"train": tokens, "validation": tokens})
    assert choose_metrics((metric,), DataConfig(), data, "loss").best == "loss"
    only_scored = dataclasses.replace(data, tokens={"validation": tokens})
    assert choose_metrics((metric,), DataConfig(), only_scored).best == metric
    if found is None:
        assert choose_metrics((metric,), DataConfig(), data).best == metric
    else:
        with pytest.raises(UserError, match=f"{metric} .*validation.*{found}.*--metric_for_best_model loss"):
            choose_metrics((metric,), DataConfig(), data)


@pytest.mark.parametrize("classes", [2, 5])
def test_agreement_of_classes_equals_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    gold, predicted = rng.integers(classes, size=(2, 200))
    for module, function in (("cohen_kappa", sk.cohen_kappa_score), ("matthews_correlation", sk.matthews_corrcoef)):
        for given in (predicted, gold, np.zeros_like(gold), 1 - gold):
            found = load_metric(module)._compute(given, gold)[module]
            assert found == pytest.approx(function(gold, given), abs=1e-12)
    assert np.isnan(load_metric("cohen_kappa")._compute([1, 1], [1, 1])["cohen_kappa"])


def test_agreement_of_thousands_of_classes_takes_little_memory() -> None:
    gold = np.arange(5000)
    metrics = [load_metric("cohen_kappa"), load_metric("matthews_correlation")]
    tracemalloc.start()
    for metric in metrics:
        metric._compute(gold[::-1], gold)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_metrics_need_no_folder_of_modules_or_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        monkeypatch.setattr(evaluate.config, name, tmp_path / "file" / "cache")
    predictions = label_predictions(30)
    values = compute_metrics(predictions, ("f1_macro", "accuracy", "average_precision"))
    assert all(np.isfinite(value) for value in values.values())
    load_metric("f1").compute(predictions=[1, 0], references=[1, 1])


def test_metric_that_cannot_be_imported_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.evaluation.scores.our_metrics", lambda: {"needs_a_package"})
    name = "lib.evaluation.metrics.needs_a_package"
    for module, words in ((None, "cannot be imported"), (types.ModuleType(name), "no class")):
        monkeypatch.setitem(sys.modules, name, module)  # importing a module that is None fails
        with pytest.raises(UserError, match=words):
            check_metrics(["needs_a_package"], 2)
