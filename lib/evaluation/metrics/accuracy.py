from sklearn.metrics import accuracy_score

from ._base import Metric


class Accuracy(Metric):
    """Share of correct predictions; multi-label: of samples with all labels correct."""

    def score(self, references, predictions, **settings):
        return accuracy_score(references, predictions, **settings)
