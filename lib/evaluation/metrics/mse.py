from sklearn.metrics import mean_squared_error

from ._base import Metric


class Mse(Metric):
    """Mean squared error."""

    prediction_type = reference_type = "float64"

    def score(self, references, predictions, **settings):
        return mean_squared_error(references, predictions, **settings)
