"""F1 score, by scikit-learn's f1_score; an `evaluate` module that is loaded by its path."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """`compute(predictions, references, sample_weight=None, average="binary", labels=None)` gives {"f1": float}."""

    def _info(self):
        number = datasets.Value("int64")
        kind = datasets.List(number) if self.config_name == "multilabel" else number
        features = datasets.Features({"predictions": kind, "references": kind})
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011",
            inputs_description="predictions and references: class numbers; multilabel: 0 or 1 for each label",
            features=features,
        )

    def _compute(self, predictions, references, sample_weight=None, average="binary", labels=None):
        return {
            "f1": float(
                f1_score(
                    references,
                    predictions,
                    average=average,
                    labels=labels,
                    zero_division=0,
                    sample_weight=sample_weight,
                )
            )
        }
