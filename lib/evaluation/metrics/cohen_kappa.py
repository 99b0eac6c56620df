from ._base import Metric, margins


class CohenKappa(Metric):
    """Cohen's kappa: agreement beyond chance; NaN where all samples have one class and all predictions too."""

    def score(self, references, predictions):
        samples, right, gold, predicted = margins(references, predictions)
        chance = sum(map(int.__mul__, gold, predicted))
        return (right * samples - chance) / (samples**2 - chance) if samples**2 > chance else float("nan")
