"""The plan of a run, its state, and the batches of its steps."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from lib.config.train import TrainingConfig
from lib.data.batching import epoch_batches
from lib.data.load import Data
from lib.data.loader import Collator, Window, training_windows
from lib.errors import UserError
from lib.training.state import State


@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from the settings, the data and the number of processes before the first step."""

    num_samples: int
    train_batch_size: int
    micro_batch_size: int
    world_size: int
    total_steps: int
    eval_every: int | None
    """None: at the end of each epoch."""
    save_every: int | None = None
    """None: after each evaluation."""
    patience: int | None = None
    """Evaluations without a better one after which the run ends early."""

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_samples / self.train_batch_size)

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def sentence(self) -> str:
        """How a step is made: `32 samples per step = 2 processes x 2 micro-batches x 8`."""
        per_process = math.ceil(min(self.train_batch_size, self.num_samples) / self.world_size)
        pieces = math.ceil(per_process / self.micro_batch_size)
        size = min(self.micro_batch_size, per_process)
        exact = self.world_size * pieces * size == self.train_batch_size
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        micro = f"{pieces} micro-batch{'es' if pieces > 1 else ''}"
        return f"{self.train_batch_size} samples per step = {processes} x {micro} x {'' if exact else 'at most '}{size}"

    def position(self, state: State) -> dict[str, float]:
        """Where the last step stands, as it is logged."""
        return {"train/learning_rate": state.learning_rate, "train/epoch": state.step / self.steps_per_epoch}

    def is_finished(self, state: State) -> bool:
        """Whether nothing is left to train: the last step is made and followed up, or evaluations were no better."""
        stopped_early = self.patience is not None and state.evals_since_best >= self.patience
        return not state.pending and (state.step >= self.total_steps or stopped_early)

    def is_eval_step(self, step: int) -> bool:
        return step == self.total_steps or step % (self.eval_every or self.steps_per_epoch) == 0

    def is_save_step(self, state: State) -> bool:
        if self.is_finished(state):
            return True
        return state.step % self.save_every == 0 if self.save_every else self.is_eval_step(state.step)


def build_plan(config: TrainingConfig, num_samples: int, world_size: int) -> Plan:
    """Raises UserError when the data is too small for a single step."""
    if num_samples == 0:
        raise UserError("the train split is empty")
    steps_per_epoch = math.ceil(num_samples / config.train_batch_size)
    return Plan(
        num_samples=num_samples,
        train_batch_size=config.train_batch_size,
        micro_batch_size=config.per_device_train_batch_size or math.ceil(config.train_batch_size / world_size),
        world_size=world_size,
        total_steps=config.max_steps or max(1, math.ceil(config.num_train_epochs * steps_per_epoch)),
        eval_every=config.eval_steps,
        save_every=config.save_steps,
        patience=config.early_stopping_patience,
    )


def all_windows(
    plan: Plan,
    config: TrainingConfig,
    data: Data,
    collator: Collator,
    rank: int,
    first_step: int = 0,
    weights: np.ndarray | None = None,
) -> Iterator[Window]:
    """The windows of all steps after `first_step`, epoch after epoch; `weights` are those of the training samples."""
    tokens, lengths = data.tokens["train"], data.lengths["train"]
    for epoch in range(first_step // plan.steps_per_epoch, plan.num_epochs):
        start = epoch * plan.steps_per_epoch
        batches = epoch_batches(lengths, plan.train_batch_size, config.seed, epoch, config.train_sampling_strategy)
        batches = batches[max(0, first_step - start) : plan.total_steps - start]
        yield from training_windows(
            tokens,
            batches,
            plan.micro_batch_size,
            rank,
            plan.world_size,
            collator,
            config.dataloader_num_workers,
            weights,
        )


def step_indices(plan: Plan, config: TrainingConfig, lengths: np.ndarray, step: int) -> np.ndarray:
    """The training samples of a step, over all processes; steps count from 1."""
    epoch, position = divmod(step - 1, plan.steps_per_epoch)
    return epoch_batches(lengths, plan.train_batch_size, config.seed, epoch, config.train_sampling_strategy)[position]
