"""Cohen's kappa, by scikit-learn's cohen_kappa_score; an `evaluate` module that is loaded by its path."""

import datasets
import evaluate
from sklearn.metrics import cohen_kappa_score


class CohenKappa(evaluate.Metric):
    """`compute(predictions, references, sample_weight=None, weights=None)` gives {"cohen_kappa": float}."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011",
            inputs_description="predictions and references: class numbers",
            features=features,
        )

    def _compute(self, predictions, references, sample_weight=None, weights=None):
        return {
            "cohen_kappa": float(
                cohen_kappa_score(references, predictions, weights=weights, sample_weight=sample_weight)
            )
        }
