from sklearn.metrics import r2_score

from ._base import Metric


class R2(Metric):
    """Share of the variance that predictions explain; NaN for fewer than two samples."""

    prediction_type = reference_type = "float64"

    def score(self, references, predictions, **settings):
        return r2_score(references, predictions, **settings) if len(references) > 1 else float("nan")
