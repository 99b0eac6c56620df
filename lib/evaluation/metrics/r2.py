"""Share of the variance that predictions explain, by scikit-learn's r2_score; an `evaluate` module that is loaded by its path."""

import datasets
import evaluate
from sklearn.metrics import r2_score


class R2(evaluate.Metric):
    """`compute(predictions, references, sample_weight=None)` gives {"r2": float}."""

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
        if len(references) < 2:
            return {"r2": float("nan")}
        return {"r2": float(r2_score(references, predictions, sample_weight=sample_weight))}
