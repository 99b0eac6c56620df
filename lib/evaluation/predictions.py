"""What a model says of every sample of a split, and what follows from it without the model."""

import dataclasses

import numpy as np

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION

PLAIN_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Results of a split in input order, equal on every process.

    `logits` float32 (samples, outputs); `losses` float32 (samples,), as trained on: cross entropy in nats, squared error,
    or binary cross entropy averaged over the labels. `labels`: classes int64 (samples,), numbers float32 (samples,), or 0
    and 1 int64 (samples, labels).
    """

    logits: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    batch_size: int = 0
    """Samples per forward that memory was enough for."""
    seconds: float = 0.0
    """From tokens at hand to results at hand."""
    problem_type: str = CLASSIFICATION
    thresholds: np.ndarray | None = None
    """Of several labels a row: the least probability at which each is given, float64 (labels,); 0.5 when absent."""

    @property
    def predicted(self) -> np.ndarray:
        """In the form of `labels`: the likeliest class, the number, or the labels whose threshold is reached."""
        if self.problem_type == REGRESSION:
            return self.logits[:, 0]
        if self.problem_type == MULTI_LABEL:
            least = PLAIN_THRESHOLD if self.thresholds is None else self.thresholds
            return (self.probabilities >= least).astype(np.int64)
        return self.logits.argmax(axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """float64 (samples, outputs): of classes, rows summing to 1; of several labels, each by itself."""
        logits = self.logits.astype(np.float64)
        if self.problem_type == MULTI_LABEL:
            from scipy.special import expit  # scipy and scikit-learn are imported when something is scored

            return expit(logits)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    def take(self, rows: np.ndarray) -> "Predictions":
        """The predictions of some samples, by their index."""
        return dataclasses.replace(self, logits=self.logits[rows], labels=self.labels[rows], losses=self.losses[rows])
