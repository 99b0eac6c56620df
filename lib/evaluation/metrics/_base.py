"""The class that the metrics in this folder share. `evaluate.load(path)` copies this file together with the metric, which
imports it by a relative name: a metric loads from any folder, without the Hub."""

import abc

import datasets
import evaluate
import numpy as np


class Metric(evaluate.Metric, abc.ABC):
    """A metric of one value: `compute(predictions, references, **settings)` gives {name of the class, in snake_case: float}.

    With the config "multilabel" a sample is a list of numbers, one per label, else it is one number.
    """

    prediction_type = reference_type = "int64"

    @abc.abstractmethod
    def score(self, references, predictions, **settings):
        """The value; `settings` are the keyword arguments of the function that computes it."""

    def _compute(self, predictions, references, **settings):
        return {self.name: float(self.score(references, predictions, **settings))}

    def _info(self):
        features = {
            "predictions": datasets.Value(self.prediction_type),
            "references": datasets.Value(self.reference_type),
        }
        if self.config_name == "multilabel":
            features = {name: datasets.List(value) for name, value in features.items()}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Pedregosa et al., Scikit-learn, JMLR 12, 2011; Virtanen et al., SciPy 1.0, Nature Methods 17, 2020",
            features=datasets.Features(features),
        )


def margins(references, predictions):
    """(samples, right ones, samples by gold class, samples by predicted class), as Python integers, which do not overflow.

    What depends on no other cell of the confusion matrix needs no table of classes x classes, gigabytes for thousands.
    """
    references, predictions = np.asarray(references), np.asarray(predictions)
    classes, codes = np.unique(np.concatenate([references, predictions]), return_inverse=True)
    sides = [np.bincount(side, minlength=len(classes)).tolist() for side in np.split(codes, [len(references)])]
    return len(references), int((references == predictions).sum()), *sides
