"""What an optimizer step changes and a checkpoint saves, as one object."""

import dataclasses
import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from lib.config.sections import EVAL_SAMPLES
from lib.config.train import OptimConfig
from lib.data.loader import Split, StepBatch
from lib.evaluation.batch_size import BatchSize, choose_size
from lib.evaluation.scores import Metrics
from lib.evaluation.scoring import Scored, evaluate
from lib.model.adapters.adapt import frozen_layers
from lib.model.layers import set_train_mode
from lib.model.sharding import is_sharded, shard_model
from lib.runtime.launch_checks import read_sharding
from lib.runtime.precision import keep_in_dtype
from lib.runtime.processes import share_weights
from lib.training.gradients import Gradients
from lib.training.meter import Meter, not_finite
from lib.training.objective import Objective
from lib.training.optimizer import (
    advance_on_metric,
    advance_scheduler,
    build_optimizer,
    build_scheduler,
    learning_rate,
)
from lib.training.plan import Plan
from lib.training.sharded_gradients import ShardedGradients
from lib.training.state import State
from lib.training.step_graphs import StepGraphs
from lib.training.working_weights import WorkingWeights, are_copied

SMALLEST_LOSS_SCALE = 2.0**-14
"""GradScaler halves its scale, 65,536 at first, at each overflow: below this, 30 in a row, it is not the scale."""


@dataclasses.dataclass
class Learner:
    """Model, optimizer and schedule, prepared by the accelerator; objective, plan, counters, sums over processes and steps."""

    accelerator: Accelerator
    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    scheduler: Any
    plan: Plan
    state: State
    working: WorkingWeights = dataclasses.field(init=False)
    gradients: Gradients | ShardedGradients = dataclasses.field(init=False)
    graphs: StepGraphs = dataclasses.field(init=False)
    meter: Meter = dataclasses.field(init=False)
    skipped: bool = False
    """Whether the last step changed nothing, since a gradient overflowed under the loss scale of fp16."""

    def __post_init__(self) -> None:
        # After the optimizer, which keeps the gradients of large tables.
        precision, device = self.accelerator.mixed_precision, self.accelerator.device
        self.working = WorkingWeights(self.model, are_copied(self.plan.config.bf16_weights, precision, device))
        if is_sharded(self.model):
            self.gradients = ShardedGradients(self.accelerator, self.model)
        else:
            self.gradients = Gradients(self.accelerator, self.model, self.working)
        self.graphs = StepGraphs(self.accelerator, self.model, self.optimizer, self.plan)
        self.meter = Meter(self.accelerator, self.plan)

    @property
    def inner_model(self) -> Any:
        """The model without what the accelerator wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def step_schedule(self, grad_norm: torch.Tensor) -> None:
        """Note the learning rate of a step, and advance the schedule unless fp16 skipped the step.

        Raises UserError if the loss scale of fp16 has become so small that no step will be made any more.
        """
        self.state.learning_rate = learning_rate(self.optimizer)
        # Accelerate's flag stays False here: fused AdamW is called for such a step too, and leaves the weights as they are.
        scaler = self.accelerator.scaler
        self.skipped = scaler is not None and not bool(torch.isfinite(grad_norm))
        if not self.skipped:
            advance_scheduler(self.scheduler)
        elif scaler.get_scale() < SMALLEST_LOSS_SCALE:
            raise not_finite(self.plan, self.state.step + 1, self.state.learning_rate)

    def count_step(self, batch: StepBatch, loss_sum: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Count a finished step, and add its loss and gradient norm to the sums that are logged.

        A step that fp16 skipped counts without its norm, which is not finite.
        """
        if self.skipped:
            grad_norm = torch.zeros((), device=grad_norm.device)
        self.state.step += 1
        self.state.samples_seen += batch.num_samples
        self.state.pending = True
        self.meter.add(loss_sum, grad_norm, batch, self.state)

    @property
    def eval_size(self) -> BatchSize:
        """What fits in memory at once in evaluation, as far as the run has learned."""
        given, state = self.plan.config.per_device_eval_batch_size, self.state
        size = choose_size(given, self.accelerator.device)
        return dataclasses.replace(size, number=getattr(state, size.name))

    @eval_size.setter
    def eval_size(self, size: BatchSize) -> None:
        setattr(self.state, size.name, size.number)

    def evaluate(self, split: Split, metrics: Metrics, tune_thresholds: bool = False) -> Scored:
        """Score a split; a batch size that did not fit in memory is not tried again.

        With `tune_thresholds`, for validation only, temperature and thresholds of the model are fitted on it before.
        """
        size, two_classes = self.eval_size, self.plan.config.threshold is not None
        scored = evaluate(self.accelerator, self.model, split, metrics.names, size, tune_thresholds, two_classes)
        if (fitted := scored.predictions.batch_size) is not None:
            self.eval_size = fitted
        return scored

    def update_best(self, scores: dict[str, float]) -> bool:
        """Note the validation scores of this step, also in a schedule that follows them; True if they are the best so far.

        Where the metric that chooses the model is not defined, such a schedule stays where it is.
        """
        metric, kept = self.plan.best_metric, self.plan.config.average_checkpoints
        if math.isfinite(scores[metric]):
            advance_on_metric(self.scheduler, scores[metric])
        if kept:
            self.state.update_ingredients(scores, metric, kept)
        return self.state.update_best(scores, metric)

    def update_average(self, steps: list[int], scores: dict[str, float]) -> bool:
        """Note the validation scores of the mean of the weights of `steps`; True if it is better than the best model."""
        return self.state.update_average(steps, scores, self.plan.best_metric)


def build_learner(
    accelerator: Accelerator, model: nn.Module, objective: Objective, plan: Plan, config: OptimConfig
) -> Learner:
    """AdamW and its schedule for the trainable parameters of `model`, prepared for all processes, in train mode.

    Frozen weights below an adapter are held in the dtype that they are computed in. Where the launcher asks for FSDP2, the
    model is spread over processes. The schedule is not prepared: it advances once per optimizer step, not once per process.
    Raises UserError if the schedule does not accept its settings, or if rates by layer, or shards, do not fit the model.
    """
    keep_in_dtype(frozen_layers(model), accelerator.mixed_precision)
    if sharding := read_sharding():
        share_weights(accelerator, model)
        shard_model(model, sharding, accelerator.device)
    optimizer = build_optimizer(model, config, accelerator.device)
    scheduler = build_scheduler(optimizer, config, plan.total_steps, plan.best_metric)
    # In evaluation mode, without DDP: `Gradients` sums, also where a process runs out of memory within backward.
    model, optimizer = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)
    if not sharding:
        share_weights(accelerator, model)
    set_train_mode(model)
    state = State(eval_batch_size=plan.config.per_device_eval_batch_size or EVAL_SAMPLES)
    return Learner(accelerator, model, objective, optimizer, scheduler, plan, state)
