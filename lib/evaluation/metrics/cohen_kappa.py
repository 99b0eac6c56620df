from sklearn.metrics import cohen_kappa_score

from ._base import Metric


class CohenKappa(Metric):
    """Cohen's kappa: agreement beyond chance."""

    def score(self, references, predictions, **settings):
        return cohen_kappa_score(references, predictions, **settings)
