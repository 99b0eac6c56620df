"""The state of a run apart from weights, optimizer and schedule. A step is always an optimizer step."""

import dataclasses
import math
from typing import Any

from lib.config.sections import EVAL_SAMPLES
from lib.evaluation.batch_size import POSITIONS
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
    ingredients: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The evaluations whose weights `--average_checkpoints` keeps, the best first, each as its step and its scores."""
    averaged_steps: list[int] = dataclasses.field(default_factory=list)
    """After training, the steps whose weights the best model is the mean of; empty where means were not looked for."""
    eval_batch_size: int = EVAL_SAMPLES
    """Samples per forward in evaluation that fit, where they are counted."""
    eval_positions: int = POSITIONS
    """Positions per forward in evaluation that fit, where these are counted: on a GPU, unless samples are asked for."""

    @property
    def last_logged(self) -> int:
        """The last step whose line in metrics.jsonl is kept when a run resumes here."""
        return self.step - 1 if self.pending else self.step

    def forget_best(self) -> None:
        """As if no evaluation had been made yet: the next one makes the best model."""
        self.best_metric, self.best_step, self.best_scores, self.evals_since_best = None, 0, {}, 0
        self.ingredients = []

    def update_best(self, scores: dict[str, float], metric: str) -> bool:
        """Note an evaluation; True if it is the best so far by `metric`.

        Of evaluations where the metric is not defined, such as a correlation of equal predictions, the one of the lowest
        loss is the best until the metric is defined for one. A model whose loss is not finite is never the best, though
        its accuracy may look like a number.
        """
        better = math.isfinite(scores["loss"])
        if better and self.best_scores:
            better = rank(scores, metric) > rank(self.best_scores, metric)
        if better:
            self.best_step = self.step
            self.set_best(scores, metric)
        self.evals_since_best = 0 if better else self.evals_since_best + 1
        return better

    def set_best(self, scores: dict[str, float], metric: str) -> None:
        self.best_metric, self.best_scores = scores[metric] if math.isfinite(scores[metric]) else None, scores

    def update_ingredients(self, scores: dict[str, float], metric: str, limit: int) -> None:
        """Note an evaluation whose weights may be averaged: the best `limit` are kept, of equal ones the earlier.

        One whose loss is not finite is never kept.
        """
        if math.isfinite(scores["loss"]):
            found = [*self.ingredients, {"step": self.step, "scores": scores}]
            self.ingredients = sorted(found, key=lambda item: rank(item["scores"], metric), reverse=True)[:limit]

    def is_ingredient(self) -> bool:
        """Whether the weights of this step are kept to be averaged."""
        return any(item["step"] == self.step for item in self.ingredients)

    def update_average(self, steps: list[int], scores: dict[str, float], metric: str) -> bool:
        """Note the evaluation of the mean of the weights of `steps`; True if it is better than the best model.

        It is if the metric is better, or the metric is equal and the loss lower.
        """
        ranks = [(rank(found, metric), -found["loss"]) for found in (scores, self.best_scores)]
        better = math.isfinite(scores["loss"]) and ranks[0] > ranks[1]
        if better:
            self.averaged_steps = steps
            self.set_best(scores, metric)
        return better


def rank(scores: dict[str, float], metric: str) -> tuple[bool, float]:
    """A key that grows with the quality of an evaluation: the metric, or minus the loss where that is not defined."""
    value = scores.get(metric, math.nan)
    if not math.isfinite(value):
        return False, -scores["loss"]
    return True, -value if metric in LOWER_IS_BETTER else value
