"""Precision, by scikit-learn's precision_score; an `evaluate` module that is loaded by its path."""

import datasets
import evaluate
from sklearn.metrics import precision_score


class Precision(evaluate.Metric):
    """`compute(predictions, references, sample_weight=None, average="binary", labels=None)` gives {"precision": float}."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011",
            inputs_description="predictions and references: class numbers",
            features=features,
        )

    def _compute(self, predictions, references, sample_weight=None, average="binary", labels=None):
        return {
            "precision": float(
                precision_score(
                    references,
                    predictions,
                    average=average,
                    labels=labels,
                    zero_division=0,
                    sample_weight=sample_weight,
                )
            )
        }
