from sklearn.metrics import accuracy_score

from ._base import Metric


class Accuracy(Metric):
    """Share of correct predictions; of several labels a row, all must be correct."""

    def score(self, references, predictions, **settings):
        return accuracy_score(references, predictions, **settings)
