import warnings

from scipy.stats import DegenerateDataWarning, spearmanr

from ._base import Metric


class Spearman(Metric):
    """Spearman's correlation, ties by their mean rank; NaN for fewer than two samples or equal predictions."""

    prediction_type = reference_type = "float64"

    def score(self, references, predictions, **settings):
        if len(references) < 2:
            return float("nan")
        with warnings.catch_warnings(action="ignore", category=DegenerateDataWarning):
            return spearmanr(references, predictions, **settings).statistic
