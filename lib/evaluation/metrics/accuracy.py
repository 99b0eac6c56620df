"""Share of correct predictions, by scikit-learn's accuracy_score; an `evaluate` module that is loaded by its path."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    """`compute(predictions, references, sample_weight=None)` gives {"accuracy": float}."""

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

    def _compute(self, predictions, references, sample_weight=None):
        return {"accuracy": float(accuracy_score(references, predictions, sample_weight=sample_weight))}
