from sklearn.metrics import matthews_corrcoef

from ._base import Metric


class MatthewsCorrelation(Metric):
    """Matthews correlation coefficient."""

    def score(self, references, predictions, **settings):
        return matthews_corrcoef(references, predictions, **settings)
