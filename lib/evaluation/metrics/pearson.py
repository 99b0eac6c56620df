"""Pearson's correlation, by SciPy's pearsonr; an `evaluate` module that is loaded by its path."""

import warnings

import datasets
import evaluate
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr


class Pearson(evaluate.Metric):
    """`compute(predictions, references)` gives {"pearson": float}."""

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        )
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Virtanen et al., SciPy 1.0, Nature Methods 17, 2020",
            inputs_description="predictions and references: real numbers",
            features=features,
        )

    def _compute(self, predictions, references):
        if len(references) < 2:
            return {"pearson": float("nan")}
        with warnings.catch_warnings():  # of equal predictions: NaN says it
            warnings.simplefilter("ignore", ConstantInputWarning)
            warnings.simplefilter("ignore", NearConstantInputWarning)
            return {"pearson": float(pearsonr(references, predictions).statistic)}
