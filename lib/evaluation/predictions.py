"""The output of a model for every sample of a split, and what follows from it without the model."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.evaluation.batch_size import BatchSize

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
    batch_size: BatchSize | None = None
    """What fitted into memory at once; None where nothing was computed."""
    seconds: float = 0.0
    """Wall-clock time of the forward passes, until all processes have the results."""
    problem_type: str = CLASSIFICATION
    temperature: float | None = None
    """Divides the logits before they become probabilities, see `calibration`; None: the model has none, as with 1."""
    thresholds: np.ndarray | None = None
    """The least probability at which each label, or each of two classes, is predicted, float64 (outputs,), those of two
    classes with the sum 1; None: 0.5 for all labels, the most probable class."""
    thresholds_given: bool = False
    """Whether the thresholds are the user's own, and not those that were tuned on validation."""
    targets: np.ndarray | None = None
    """The probabilities of soft labels, float64 (samples, outputs); None: the labels are hard."""

    @property
    def wanted(self) -> np.ndarray:
        """What the loss compares with: `targets`, or `labels` where they are hard."""
        return self.labels if self.targets is None else self.targets

    @property
    def predicted(self) -> np.ndarray:
        """Predictions in the form of `labels`: the most probable class, the number, or 0 and 1 for each label."""
        if self.problem_type == REGRESSION:
            return self.logits[:, 0]
        if self.problem_type == MULTI_LABEL:
            thresholds = DEFAULT_THRESHOLD if self.thresholds is None else self.thresholds
            return np.concatenate([(block.probabilities >= thresholds).astype(np.int64) for block in self.blocks()])
        if self.thresholds is not None:  # of two classes
            return (self.probabilities_of(1) >= self.thresholds[1]).astype(np.int64)
        return np.concatenate(
            [block.logits.argmax(axis=1) for block in self.blocks()]
        )  # argmax copies what it is given

    @property
    def probabilities(self) -> np.ndarray:
        """float64 (samples, outputs): softmax(logits / temperature), or for multi-label the sigmoid."""
        # SciPy is imported late: not before something is scored.
        from scipy.special import expit, softmax

        logits = self.logits.astype(np.float64) / (self.temperature or 1.0)
        return expit(logits) if self.problem_type == MULTI_LABEL else softmax(logits, axis=1)

    def probabilities_of(self, output: int) -> np.ndarray:
        """The probabilities of one label, or of one class, float64 (samples,)."""
        from scipy.special import expit

        if self.problem_type != MULTI_LABEL:
            return np.concatenate([block.probabilities[:, output] for block in self.blocks()])
        return expit(self.logits[:, output].astype(np.float64) / (self.temperature or 1.0))

    @property
    def uncalibrated(self) -> "Predictions":
        """The same with the probabilities of the bare logits."""
        return dataclasses.replace(self, temperature=None)

    def blocks(self) -> Iterator["Predictions"]:
        """The predictions of consecutive samples, few enough that their probabilities take little memory."""
        size = max(1, BLOCK // self.logits.shape[1])
        for start in range(0, max(1, len(self.labels)), size):
            yield self.take(slice(start, start + size))

    def take(self, rows: np.ndarray | slice) -> "Predictions":
        """The predictions of some samples, by index."""
        names = ("logits", "labels", "losses") if self.targets is None else ("logits", "labels", "losses", "targets")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in names})
