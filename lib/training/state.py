"""The state of a run apart from weights, optimizer and schedule. A step is always an optimizer step."""

import dataclasses
import math

from lib.evaluation.scores import LOWER_IS_BETTER


@dataclasses.dataclass
class State:
    """Counters, the best model so far, and sizes that fit in memory: what a checkpoint saves as JSON."""

    step: int = 0
    samples_seen: int = 0
    logged: int = 0
    """Lines of metrics.jsonl up to here."""
    pending: bool = False
    """True between a step and its logging, evaluation and saving; a resumed run does those first."""
    learning_rate: float = 0.0
    """That of the last step."""
    train_seconds: float = 0.0
    best_metric: float | None = None
    """The best value of the metric that chooses the model; None where it was not defined yet, and the loss chose."""
    best_step: int = 0
    """The step of the best model; 0: there is none."""
    best_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    evals_since_best: int = 0
    micro_batch_positions: int | None = None
    """Positions (rows x padded length) per forward after an out-of-memory error; None: micro-batches as planned."""
    eval_batch_size: int = 64

    @property
    def last_logged(self) -> int:
        """The last step whose line in metrics.jsonl is kept when a run resumes here."""
        return self.step - 1 if self.pending else self.step

    def forget_best(self) -> None:
        """As if no evaluation had been made yet: the next one makes the best model."""
        self.best_metric, self.best_step, self.best_scores, self.evals_since_best = None, 0, {}, 0

    def update_best(self, scores: dict[str, float], metric: str) -> bool:
        """Note an evaluation; True if it is the best so far by `metric`.

        Of evaluations where the metric is not defined, such as a correlation of equal predictions, the one of the lowest
        loss is the best until the metric is defined for one. A model whose loss is not finite is never the best, though
        its accuracy may look like a number.
        """
        value, best = scores[metric], self.best_metric
        defined, better = math.isfinite(value), math.isfinite(scores["loss"])
        if better and best is not None:
            better = defined and (value < best if metric in LOWER_IS_BETTER else value > best)
        elif better and self.best_step and not defined:
            better = scores["loss"] < self.best_scores["loss"]
        if better:
            self.best_metric, self.best_step, self.best_scores = value if defined else None, self.step, scores
        self.evals_since_best = 0 if better else self.evals_since_best + 1
        return better
