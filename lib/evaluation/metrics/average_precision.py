import warnings

from sklearn.metrics import average_precision_score

from ._base import Metric


class AveragePrecision(Metric):
    """Multi-label average precision, from a score of each label; 0 for a label that no sample has."""

    prediction_type = "float64"

    def score(self, references, predictions, **settings):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No positive class found")
            return average_precision_score(references, predictions, **settings)

    def _info(self):
        self.config_name = "multilabel"
        return super()._info()
