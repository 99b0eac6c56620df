"""All that a run knows beside weights, optimizer and schedule."""

import dataclasses


@dataclasses.dataclass
class State:
    """All that a run knows beside weights, optimizer and schedule; steps are optimizer steps."""

    step: int = 0
    samples_seen: int = 0
    pending: bool = False
    """The last step is made, but not yet logged, evaluated and saved as its number may ask."""
    learning_rate: float = 0.0
    """That of the last step."""
    train_seconds: float = 0.0
    best_metric: float | None = None
    best_step: int = 0
    best_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    evals_since_best: int = 0
    micro_batch_size: int | None = None
    """Samples per forward after memory was too short for what was planned."""
    eval_batch_size: int = 64

    @property
    def last_logged(self) -> int:
        """The last step whose line in metrics.jsonl stands when a run resumes here."""
        return self.step - 1 if self.pending else self.step
