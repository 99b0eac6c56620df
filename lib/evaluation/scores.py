"""Metrics: which ones a run computes, which one chooses its model, and their values for given predictions."""

import atexit
import dataclasses
import functools
import importlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, DataConfig, words
from lib.data.catalog import catalog_entry
from lib.data.load import Data
from lib.errors import UserError, first_line, printable
from lib.evaluation.predictions import Predictions

FOLDER = Path(__file__).parent / "metrics"
"""The metrics: `evaluate` modules, one per file."""

METRICS = {
    CLASSIFICATION: ("accuracy", "cohen_kappa", "f1", "matthews_correlation", "precision", "recall"),
    REGRESSION: ("mae", "mse", "pearson", "r2", "spearman"),
    MULTI_LABEL: ("accuracy", "average_precision", "f1", "precision", "recall"),
}
"""The modules that fit each problem type. A module added to the folder and not listed here fits all of them."""

DEFAULT_METRICS = {
    CLASSIFICATION: ("accuracy", "f1_macro"),
    REGRESSION: ("pearson", "spearman", "mse"),
    # The first one chooses the model: average precision needs no thresholds.
    MULTI_LABEL: ("average_precision", "f1_micro", "f1_macro"),
}

AVERAGED = ("f1", "precision", "recall")
"""Modules with one value per class, averaged as the ending of the metric's name says: `f1_macro`."""

AVERAGES = ("macro", "micro", "weighted", "samples")
LOWER_IS_BETTER = ("loss", "mae", "mse")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What is computed on each split besides the loss."""

    names: tuple[str, ...]
    best: str
    """The metric that chooses the model: one of `names`, or "loss"."""


def choose_metrics(
    names: tuple[str, ...] | None,
    config: DataConfig,
    data: Data,
    metric_for_best_model: str | None = None,
    trained: tuple[str, ...] = (),
) -> Metrics:
    """`names`, or by default those of the model's training that are `trained`, or else of the data set.

    The first chooses the model unless `metric_for_best_model` does.

    Raises UserError for a metric that is unknown or does not fit the data, and for a `metric_for_best_model` that is
    not computed or, with data for training, that the validation labels leave undefined.
    """
    ours = our_metrics()  # the model may come from others, who have metrics of their own
    names = names or tuple(name for name in trained if {name, split_average(name)[0]} & ours)
    names = names or default_metrics(config, data.problem_type)
    check_metrics(names, len(data.label_names), data.problem_type)
    best = (metric_for_best_model or names[0]).removeprefix("eval/").removeprefix("eval_")
    if best not in (*names, "loss"):
        listed = ", ".join(names)
        raise UserError(f"--metric_for_best_model {metric_for_best_model} is not among the metrics: {listed}, loss")
    if "train" in data.tokens and "validation" in data.tokens and best != "loss":
        check_defined(best, data.labels("validation"), data)
    return Metrics(names, best)


def check_defined(metric: str, labels: np.ndarray, data: Data) -> None:
    """Raise UserError if the validation labels alone make a metric undefined or the same for all predictions."""
    module, average = split_average(metric)
    problem, found = data.problem_type, ""
    if problem == REGRESSION:
        if module in ("pearson", "spearman", "r2") and (len(labels) < 2 or (labels == labels[0]).all()):
            found = f"one value only ({labels[0]:g})"
    elif problem == MULTI_LABEL:
        some, every = labels.any(axis=0), labels.all(axis=0)
        if module == "average_precision" and not (some & ~every).any():
            found = "no label that some rows have and others do not"
        if module in AVERAGED and not some.any():
            found = "no row with a label"
    elif len(np.unique(labels)) == 1 and module in ("cohen_kappa", "matthews_correlation"):
        found = f"one class only ({printable(data.label_names[labels[0]])})"
    elif module in AVERAGED and not average and not (labels == 1).any():
        found = f"no row of class {printable(data.label_names[1])}"
    if found:
        raise UserError(
            f"{metric} cannot choose the model: the validation split has {found} in its {len(labels):,} rows. Choose by "
            "another metric, --metric_for_best_model loss, or validate on rows that differ (--validation_file)"
        )


def default_metrics(config: DataConfig, problem_type: str = CLASSIFICATION) -> tuple[str, ...]:
    """The usual metrics of a known classification data set, then those of the problem type.

    Macro F1 stands beside accuracy for all classes: where some are rare, accuracy says little about them.
    """
    entry = catalog_entry(config)
    usual = entry.metrics if entry and problem_type == CLASSIFICATION else ()
    return tuple(dict.fromkeys([*usual, *DEFAULT_METRICS[problem_type]]))


def check_metrics(names: Sequence[str], outputs: int, problem_type: str = CLASSIFICATION) -> None:
    """Raise UserError for a metric that is unknown or does not fit the problem type or the number of outputs."""
    known, fitting = {module for modules in METRICS.values() for module in modules}, METRICS[problem_type]
    for name in names:
        module, _ = split_average(name)
        if module in known.difference(fitting):
            raise UserError(f"--metrics {name} is not for {words(problem_type)}; use some of {', '.join(fitting)}")
        module = metric_settings(name, outputs, problem_type)[0]
        metric_path(module)
        if module not in known:
            load_metric(module, problem_type)  # of the user: trouble shows before the first step
    scratch_folder()


def compute_metrics(predictions: Predictions, names: Sequence[str]) -> dict[str, float]:
    """`loss`, the mean over samples, and each metric of `names`. Raises UserError for an unknown metric."""
    scores = {"loss": float(predictions.losses.astype(np.float64).mean())}
    for name in names:
        scores |= compute_metric(name, predictions)
    return scores


def compute_metric(name: str, predictions: Predictions) -> dict[str, float]:
    """The values of a metric by name: one, or several where its module returns several; NaN if predictions are not finite."""
    module, settings = metric_settings(name, predictions.logits.shape[1], predictions.problem_type)
    if not is_finite(module, predictions):
        return {name: float("nan")}
    given, metric = metric_input(module, predictions), load_metric(module, predictions.problem_type)
    # Ours need no table of `datasets` in between, which takes seconds for thousands of labels.
    direct = predictions.problem_type == MULTI_LABEL and module in METRICS[MULTI_LABEL]
    result = (metric._compute if direct else metric.compute)(
        predictions=given, references=predictions.labels, **settings
    )
    return {name if key == module else key: float(value) for key, value in result.items() if np.ndim(value) == 0}


def is_finite(module: str, predictions: Predictions) -> bool:
    """Whether what the module compares with the labels holds numbers only: classes always do."""
    if module == "average_precision":  # the probability of an infinite logit is 0 or 1
        return not np.isnan(predictions.logits).any()
    return predictions.problem_type != REGRESSION or bool(np.isfinite(predictions.predicted).all())


def metric_input(module: str, predictions: Predictions) -> np.ndarray:
    """What the module compares with the labels: probabilities for average precision, else what was predicted.

    A temperature keeps their order, but may round two of them to one number.
    """
    return predictions.uncalibrated.probabilities if module == "average_precision" else predictions.predicted


def metric_settings(name: str, outputs: int, problem_type: str = CLASSIFICATION) -> tuple[str, dict[str, Any]]:
    """The module of a metric and the keyword arguments for its `compute`.

    `f1_macro` is F1 averaged over all classes, `f1` that of class 1 of two. Raises UserError for f1, precision or
    recall of more than two classes without an average.
    """
    module, average = split_average(name)
    if module == "average_precision":
        return module, {"average": average or "macro"}
    if module not in AVERAGED:
        return name, {}
    if problem_type == MULTI_LABEL and average:
        return module, {"average": average}
    if average in ("macro", "micro", "weighted"):
        return module, {"average": average, "labels": list(range(outputs))}
    if average:
        raise UserError(f"--metrics {name} is for multi-label data; use {module}_macro")
    if outputs != 2 or problem_type == MULTI_LABEL:
        raise UserError(f"--metrics {name} is for two classes, the data has {outputs}; use {name}_macro")
    return module, {"average": "binary"}


def split_average(name: str) -> tuple[str, str]:
    """(module, average) of a metric's name; the average is empty where the name ends with none."""
    module, _, average = name.rpartition("_")
    return (module, average) if average in AVERAGES else (name, "")


def load_metric(module: str, problem_type: str = CLASSIFICATION) -> Any:
    """The `evaluate` module of that name. Raises UserError if it is not in the folder, or cannot be imported.

    It is imported as it is: `evaluate.load` would copy it into HF_MODULES_CACHE under a lock, which a shared or full cache
    may refuse.
    """
    path = metric_path(module)
    import evaluate  # takes seconds to import

    try:
        found = importlib.import_module(f"lib.evaluation.metrics.{module}")
    except ImportError as error:
        raise UserError(f"--metrics {module}: {path} cannot be imported: {first_line(error)}") from error
    own = [kind for kind in vars(found).values() if getattr(kind, "__module__", None) == found.__name__]
    kinds = [kind for kind in own if isinstance(kind, type) and issubclass(kind, evaluate.EvaluationModule)]
    if not kinds:
        raise UserError(f"--metrics {module}: {path} has no class of `evaluate.Metric`")
    name = "multilabel" if problem_type == MULTI_LABEL else None
    return kinds[0](config_name=name, keep_in_memory=True, cache_dir=scratch_folder())


@functools.cache
def scratch_folder() -> str:
    """A folder of this process for `evaluate`, which makes an empty one for each metric even where it writes nothing."""
    place = tempfile.mkdtemp(prefix="metrics-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def our_metrics() -> set[str]:
    return {path.stem for path in FOLDER.glob("[!_]*.py")}


def metric_path(module: str) -> Path:
    """The file of a module. Raises UserError if it is not in the folder: a metric of the Hub is remote code."""
    ours = sorted(our_metrics())
    if module not in ours:
        raise UserError(
            f"--metrics {module}: not one of ours ({', '.join(ours)}). Metrics of the Hub are remote code and are not run; "
            f"read the one you mean, and put it into lib/evaluation/metrics as {module}.py"
        )
    return FOLDER / f"{module}.py"
