"""The plan of a run: which samples form each step, and when it is logged, evaluated and saved."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from accelerate import Accelerator

from lib.config.train import TrainConfig, TrainingConfig
from lib.data.batching import Indices, epoch_batches
from lib.data.load import Data
from lib.data.loader import Batches, Share, StepBatch
from lib.errors import UserError
from lib.evaluation.scores import Metrics
from lib.runtime.signals import Stopped
from lib.training.state import State

WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules that do not use `--warmup_steps`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a run. `lengths` counts the tokens of each training sample; steps count from 1."""

    config: TrainingConfig
    lengths: np.ndarray
    best_metric: str = "loss"
    """The validation metric that chooses the model."""
    logging_steps: int = 1
    rank: int = 0
    world_size: int = 1
    is_solved: bool = False
    """With --head_solver: one step over all samples, which reads no batches."""

    @property
    def micro_batch_size(self) -> int:
        """Samples per forward, at most."""
        config = self.config
        return config.per_device_train_batch_size or math.ceil(config.train_batch_size / self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        return 1 if self.is_solved else math.ceil(len(self.lengths) / self.config.train_batch_size)

    @property
    def total_steps(self) -> int:
        config = self.config
        if self.is_solved:
            return 1
        return config.max_steps or max(1, math.ceil(config.num_train_epochs * self.steps_per_epoch))

    @property
    def eval_steps(self) -> int:
        """Steps from one evaluation to the next."""
        every = self.config.eval_steps
        return self.steps_per_epoch if every is None else max(1, count_steps(every, self.total_steps))

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def sentence(self) -> str:
        """How a step is divided: `32 samples per step = 2 processes x 2 micro-batches x 8`."""
        batch_size = self.config.train_batch_size
        if self.is_solved:
            return f"all {len(self.lengths):,} samples in one step: the head is solved for"
        per_process = math.ceil(min(batch_size, len(self.lengths)) / self.world_size)
        pieces = math.ceil(per_process / self.micro_batch_size)
        size = min(self.micro_batch_size, per_process)
        exact = self.world_size * pieces * size == batch_size
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        micro = f"{pieces} micro-batch{'es' if pieces > 1 else ''}"
        return f"{batch_size} samples per step = {processes} x {micro} x {'' if exact else 'at most '}{size}"

    def epoch(self, epoch: int) -> list[Indices]:
        """The samples of each step of an epoch, over all processes."""
        config = self.config
        strategy = config.train_sampling_strategy
        return epoch_batches(self.lengths, config.train_batch_size, config.seed, epoch, strategy)

    def samples_of(self, step: int) -> Indices:
        """The samples of a step, over all processes."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        return self.epoch(epoch)[position]

    def step_batches(self, batches: Batches, first_step: int = 0) -> Iterator[StepBatch]:
        """This process's share of all steps after `first_step`, epoch after epoch."""
        if self.is_solved:
            yield StepBatch([], len(self.lengths), float(len(self.lengths)))
            return
        share = Share(self.micro_batch_size, self.rank, self.world_size)
        for epoch in range(first_step // self.steps_per_epoch, self.num_epochs):
            start = epoch * self.steps_per_epoch
            steps = self.epoch(epoch)[max(0, first_step - start) : self.total_steps - start]
            yield from batches.steps(steps, share, self.config.dataloader_num_workers)

    def steps(self, batches: Batches, state: State) -> Iterator[StepBatch | None]:
        """This process's share of each step until training is finished.

        None comes first if the run was stopped between a step and its logging, evaluation and saving. Raises Stopped after
        the step of `--pause_at_step`.
        """
        step_batches = self.step_batches(batches, state.step)
        pause = self.config.pause_at_step
        while not self.is_finished(state):
            if pause is not None and state.step >= pause and not state.pending:
                raise Stopped(f"--pause_at_step {pause}")
            yield None if state.pending else next(step_batches)

    def is_finished(self, state: State) -> bool:
        """Whether training ends here: no step is pending, and the last step is made or early stopping applies."""
        patience = self.config.early_stopping_patience
        stopped_early = patience is not None and state.evals_since_best >= patience
        return not state.pending and (state.step >= self.total_steps or stopped_early)

    def is_log_step(self, state: State) -> bool:
        """Every `--logging_steps`, and each evaluation."""
        return state.step % self.logging_steps == 0 or self.is_eval_step(state)

    def is_eval_step(self, state: State) -> bool:
        """Every `--eval_steps`, by default at the end of each epoch; and the last step."""
        return state.step == self.total_steps or state.step % self.eval_steps == 0

    def is_save_step(self, state: State) -> bool:
        """Every `--save_steps`, by default after each evaluation; the end of training; weights that are kept to be averaged."""
        if self.is_finished(state) or state.is_ingredient():
            return True
        every = self.config.save_steps
        return state.step % every == 0 if every else self.is_eval_step(state)


def count_steps(setting: float, total_steps: int) -> int:
    """The steps that a setting means: itself, or if below 1 that share of all steps, rounded up."""
    return int(setting) if setting >= 1 else math.ceil(round(setting * total_steps, 6))


def build_plan(config: TrainConfig, data: Data, metrics: Metrics, accelerator: Accelerator) -> Plan:
    """The plan of this process.

    Raises UserError if there are no training samples, more steps than can be counted, or soft labels to solve for.
    """
    lengths, logging_steps = data.lengths["train"], config.tracking.logging_steps
    if not len(lengths):
        raise UserError("the train split is empty")
    rank, world_size = accelerator.process_index, accelerator.num_processes
    solved = config.model.head_solver is not None
    if solved and data.is_soft("train"):
        raise UserError(
            f"--head_solver {config.model.head_solver} solves for hard labels, and those of the train split are probabilities "
            "(--soft_labels); leave --head_solver out: --freeze backbone alone trains the head on them"
        )
    plan = Plan(config.training, lengths, metrics.best, logging_steps, rank, world_size, solved)
    if plan.total_steps >= 2**31:
        raise UserError(
            f"--num_train_epochs {config.training.num_train_epochs:g}: {plan.total_steps:,} steps are more than 2**31"
        )
    if config.training.average_checkpoints and plan.total_steps <= plan.eval_steps:
        raise UserError(
            f"--average_checkpoints {config.training.average_checkpoints}: training of {plan.total_steps:,} steps has one "
            "evaluation, and nothing to average; train for more epochs, give a smaller --eval_steps, or leave it out"
        )
    if config.optim.lr_scheduler_type not in WITHOUT_WARMUP and config.optim.warmup_steps > plan.total_steps:
        raise UserError(
            f"--warmup_steps {config.optim.warmup_steps:g} is longer than the training of {plan.total_steps:,} steps: the rate "
            "would never reach --learning_rate; use fewer, or a share of all steps such as --warmup_steps 0.06"
        )
    return plan
