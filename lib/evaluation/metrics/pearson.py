import warnings

from scipy.stats import DegenerateDataWarning, pearsonr

from ._base import Metric


class Pearson(Metric):
    """Pearson's correlation; NaN for fewer than two samples or equal predictions."""

    prediction_type = reference_type = "float64"

    def score(self, references, predictions, **settings):
        if len(references) < 2:
            return float("nan")
        with warnings.catch_warnings(action="ignore", category=DegenerateDataWarning):
            return pearsonr(references, predictions, **settings).statistic
