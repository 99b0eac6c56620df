"""Scores of predictions: which metrics there are, what each needs to know, and their values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION, DataConfig, words
from lib.config.train import TrainConfig
from lib.data.catalog import catalog_source
from lib.data.load import Data
from lib.errors import UserError
from lib.evaluation.predictions import Predictions

USUAL_METRICS = {
    CLASSIFICATION: ("accuracy", "f1_macro"),
    REGRESSION: ("pearson", "spearman", "mse"),
    # The first one chooses the model: average precision needs no thresholds.
    MULTI_LABEL: ("average_precision", "f1_micro", "f1_macro"),
}

OWN_METRICS = {
    CLASSIFICATION: ("accuracy", "cohen_kappa", "f1", "matthews_correlation", "precision", "recall"),
    REGRESSION: ("mae", "mse", "pearson", "r2", "spearman"),
    MULTI_LABEL: ("accuracy", "average_precision", "f1", "precision", "recall"),
}
"""Modules of lib/evaluation/metrics by the problem they are for; a module that is in no row is for all of them."""

LOWER_IS_BETTER = ("loss", "mae", "mse")


METRICS = Path(__file__).parent / "metrics"
AVERAGES = ("macro", "micro", "weighted", "samples")
AVERAGED = ("f1", "precision", "recall")


def compute_metrics(predictions: Predictions, names: Sequence[str]) -> dict[str, float]:
    """`loss` (mean over samples) and each metric of `names`, through the `evaluate` interface.

    Raises UserError for a metric that is not one of ours.
    """
    scores = {"loss": float(predictions.losses.astype(np.float64).mean())}
    for name in names:
        scores |= compute_metric(name, predictions)
    return scores


def compute_metric(name: str, predictions: Predictions) -> dict[str, float]:
    """A metric by its name; a module may give several values."""
    module, settings = metric_settings(name, predictions.logits.shape[1], predictions.problem_type)
    given = metric_input(module, predictions)
    if not np.isfinite(given).all():
        return {name: float("nan")}
    metric = load_metric(module, predictions.problem_type)
    result = metric.compute(predictions=given, references=predictions.labels, **settings)
    return {name if key == module else key: float(value) for key, value in result.items() if np.ndim(value) == 0}


def metric_input(module: str, predictions: Predictions) -> np.ndarray:
    """What a metric compares with the labels: probabilities where it looks at their order, else what was predicted."""
    return predictions.probabilities if module == "average_precision" else predictions.predicted


def metric_settings(name: str, outputs: int, problem_type: str = CLASSIFICATION) -> tuple[str, dict[str, Any]]:
    """Module and settings of a metric: `f1_macro` is f1 averaged over all classes, `f1` that of class 1 of two.

    Raises UserError for f1, precision or recall of more than two classes without a way to average.
    """
    module, _, average = name.rpartition("_")
    module, average = (module, average) if average in AVERAGES else (name, "")
    if module == "average_precision":
        return module, {"average": average or "macro"}
    if module not in AVERAGED:
        return name, {}
    if problem_type == MULTI_LABEL and average:
        return module, {"average": average}
    if average in ("macro", "micro", "weighted"):
        return module, {"average": average, "labels": list(range(outputs))}
    if average:
        raise UserError(f"--metrics {name} is for several labels a row; use {module}_macro")
    if outputs != 2 or problem_type == MULTI_LABEL:
        raise UserError(f"--metrics {name} is for two classes, the data has {outputs}; use {name}_macro")
    return module, {"average": "binary"}


def check_metrics(names: Sequence[str], outputs: int, problem_type: str = CLASSIFICATION) -> None:
    """Raise UserError for a metric that cannot be computed, before a run depends on it."""
    fitting = OWN_METRICS[problem_type]
    for name in names:
        module = next((own for own in sorted(every_own()) if name in (own, *(f"{own}_{a}" for a in AVERAGES))), name)
        if module in every_own() - {*fitting}:
            raise UserError(f"--metrics {name} is not for {words(problem_type)}; use some of {', '.join(fitting)}")
        module, _ = metric_settings(name, outputs, problem_type)
        if not (METRICS / f"{module}.py").is_file():
            load_metric(module)


def every_own() -> set[str]:
    return {name for names in OWN_METRICS.values() for name in names}


def load_metric(module: str, problem_type: str = CLASSIFICATION) -> Any:
    """An `evaluate` module of ours, by its path. Raises UserError for others: one of the Hub is a program, run unseen."""
    ours = sorted(path.stem for path in METRICS.glob("[!_]*.py"))
    if module not in ours:
        raise UserError(
            f"--metrics {module}: not one of ours ({', '.join(ours)}). Metrics of the Hub are programs and are not run; "
            f"read the one you mean, and put it into lib/evaluation/metrics as {module}.py"
        )
    import evaluate  # takes seconds to import

    form = "multilabel" if problem_type == MULTI_LABEL else None
    return evaluate.load(str(METRICS / f"{module}.py"), form, keep_in_memory=True)


def default_metrics(config: DataConfig, problem_type: str = CLASSIFICATION) -> tuple[str, ...]:
    source = catalog_source(config)
    return source.metrics if source and problem_type == CLASSIFICATION else USUAL_METRICS[problem_type]


def best_metric(wanted: str | None, metrics: Sequence[str]) -> str:
    """The metric that chooses the model; raises UserError when it is not computed."""
    name = (wanted or metrics[0]).removeprefix("eval/").removeprefix("eval_")
    if name not in (*metrics, "loss"):
        raise UserError(f"--metric_for_best_model {wanted} is not among the metrics: {', '.join(metrics)}, loss")
    return name


def choose_metrics(config: TrainConfig, data: Data) -> tuple[tuple[str, ...], str]:
    """The metrics to compute, and the one that chooses the model; raises UserError when they cannot be computed."""
    metrics = config.metrics or default_metrics(config.data, data.problem_type)
    check_metrics(metrics, len(data.label_names), data.problem_type)
    return metrics, best_metric(config.training.metric_for_best_model, metrics)
