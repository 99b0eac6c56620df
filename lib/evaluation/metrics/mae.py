"""Mean absolute error, by scikit-learn's mean_absolute_error; an `evaluate` module that is loaded by its path."""

import datasets
import evaluate
from sklearn.metrics import mean_absolute_error


class Mae(evaluate.Metric):
    """`compute(predictions, references, sample_weight=None)` gives {"mae": float}."""

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        )
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011",
            inputs_description="predictions and references: real numbers",
            features=features,
        )

    def _compute(self, predictions, references, sample_weight=None):
        return {"mae": float(mean_absolute_error(references, predictions, sample_weight=sample_weight))}
