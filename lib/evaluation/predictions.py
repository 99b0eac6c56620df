"""The output of a model for every sample of a split, and what follows from it without the model."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION

DEFAULT_THRESHOLD = 0.5
BLOCK = 2**21
"""Probabilities are computed for as many at once: of thousands of classes, all would take gigabytes."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Results of a split in input order, equal on every process."""

    logits: np.ndarray
    """float32 (samples, outputs)"""
    labels: np.ndarray
    """Classes int64 (samples,), numbers float32 (samples,), or 0 and 1 int64 (samples, labels)."""
    losses: np.ndarray
    """float32 (samples,): cross entropy in nats, squared error, or binary cross entropy averaged over the labels.

    Of soft labels they are those of the probabilities; `labels` are then the most probable ones."""
    batch_size: int = 0
    """Samples per forward pass that fitted into memory."""
    seconds: float = 0.0
    """Wall-clock time of the forward passes, until all processes have the results."""
    problem_type: str = CLASSIFICATION
    thresholds: np.ndarray | None = None
    """Multi-label: the least probability at which each label is predicted, float64 (labels,); None: 0.5 for all."""

    @property
    def predicted(self) -> np.ndarray:
        """Predictions in the form of `labels`: the most probable class, the number, or 0 and 1 for each label."""
        if self.problem_type == REGRESSION:
            return self.logits[:, 0]
        if self.problem_type == MULTI_LABEL:
            thresholds = DEFAULT_THRESHOLD if self.thresholds is None else self.thresholds
            return np.concatenate([(block.probabilities >= thresholds).astype(np.int64) for block in self.blocks()])
        return np.concatenate(
            [block.logits.argmax(axis=1) for block in self.blocks()]
        )  # argmax copies what it is given

    @property
    def probabilities(self) -> np.ndarray:
        """float64 (samples, outputs): the softmax, or for multi-label the sigmoid, of the logits."""
        # SciPy is imported late: not before something is scored.
        from scipy.special import expit, softmax

        logits = self.logits.astype(np.float64)
        return expit(logits) if self.problem_type == MULTI_LABEL else softmax(logits, axis=1)

    def probabilities_of(self, output: int) -> np.ndarray:
        """Multi-label: the probabilities of one label, float64 (samples,)."""
        from scipy.special import expit

        return expit(self.logits[:, output].astype(np.float64))

    def blocks(self) -> Iterator["Predictions"]:
        """The predictions of consecutive samples, few enough that their probabilities take little memory."""
        size = max(1, BLOCK // self.logits.shape[1])
        for start in range(0, max(1, len(self.labels)), size):
            yield self.take(slice(start, start + size))

    def take(self, rows: np.ndarray | slice) -> "Predictions":
        """The predictions of some samples, by index."""
        return dataclasses.replace(self, logits=self.logits[rows], labels=self.labels[rows], losses=self.losses[rows])
