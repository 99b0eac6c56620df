import math

from ._base import Metric, margins


class MatthewsCorrelation(Metric):
    """Matthews correlation coefficient; 0 where all samples have one class, or all predictions."""

    def score(self, references, predictions):
        samples, right, gold, predicted = margins(references, predictions)
        chance = sum(map(int.__mul__, gold, predicted))
        spread = [samples**2 - sum(count**2 for count in side) for side in (gold, predicted)]
        return (right * samples - chance) / math.sqrt(spread[0] * spread[1]) if all(spread) else 0.0
