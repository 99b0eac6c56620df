"""Recall, by scikit-learn's recall_score; an `evaluate` module that is loaded by its path."""

import datasets
import evaluate
from sklearn.metrics import recall_score


class Recall(evaluate.Metric):
    """`compute(predictions, references, sample_weight=None, average="binary", labels=None)` gives {"recall": float}."""

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
            "recall": float(
                recall_score(
                    references,
                    predictions,
                    average=average,
                    labels=labels,
                    zero_division=0,
                    sample_weight=sample_weight,
                )
            )
        }
