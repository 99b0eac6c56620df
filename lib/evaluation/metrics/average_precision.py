"""Average precision of several labels a row, by scikit-learn's average_precision_score; loaded by its path."""

import warnings

import datasets
import evaluate
from sklearn.metrics import average_precision_score


class AveragePrecision(evaluate.Metric):
    """`compute(predictions, references, sample_weight=None, average="macro")` gives {"average_precision": float}."""

    def _info(self):
        scores, labels = datasets.List(datasets.Value("float64")), datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011",
            inputs_description="predictions: a score of each label; references: 0 or 1 for each label",
            features=datasets.Features({"predictions": scores, "references": labels}),
        )

    def _compute(self, predictions, references, sample_weight=None, average="macro"):
        with warnings.catch_warnings():  # a label that no row has counts as 0
            warnings.filterwarnings("ignore", message="No positive class found")
            score = average_precision_score(references, predictions, average=average, sample_weight=sample_weight)
        return {"average_precision": float(score)}
