from sklearn.metrics import mean_absolute_error

from ._base import Metric


class Mae(Metric):
    """Mean absolute error."""

    prediction_type = reference_type = "float64"

    def score(self, references, predictions, **settings):
        return mean_absolute_error(references, predictions, **settings)
