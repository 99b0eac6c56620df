"""The plan of a run, its state, and one optimizer step."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lib.batching import Collator, Window, epoch_batches, padding_share, training_windows
from lib.config import OptimConfig, TrainingConfig, UserError
from lib.data import Data
from lib.optim import advance_scheduler
from lib.runtime import seed_everything

LOWER_IS_BETTER = ("loss",)


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

    def is_eval_step(self, step: int) -> bool:
        return step == self.total_steps or step % (self.eval_every or self.steps_per_epoch) == 0


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
    )


@dataclasses.dataclass
class State:
    """All that a run knows beside weights, optimizer and schedule; steps are optimizer steps."""

    step: int = 0
    samples_seen: int = 0
    best_metric: float | None = None
    best_step: int = 0
    evals_since_best: int = 0


def best_metric(wanted: str | None, metrics: Sequence[str]) -> str:
    """The metric that chooses the model; raises UserError when it is not computed."""
    name = (wanted or metrics[0]).removeprefix("eval/").removeprefix("eval_")
    if name not in (*metrics, *LOWER_IS_BETTER):
        raise UserError(f"--metric_for_best_model {wanted} is not among the metrics: {', '.join(metrics)}, loss")
    return name


def is_better(metric: float, best: float | None, name: str) -> bool:
    """Whether `metric` beats `best`; a number that is not finite never does."""
    if not math.isfinite(metric):
        return False
    return best is None or (metric < best if name in LOWER_IS_BETTER else metric > best)


def update_best(state: State, scores: dict[str, float], name: str) -> bool:
    """Note an evaluation in `state`; True when it is the best so far.

    A model whose loss is not finite is never the best, though its accuracy may look like a number.
    """
    better = math.isfinite(scores["loss"]) and is_better(scores[name], state.best_metric, name)
    if better:
        state.best_metric, state.best_step = scores[name], state.step
    state.evals_since_best = 0 if better else state.evals_since_best + 1
    return better


def should_stop(state: State, patience: int | None) -> bool:
    return patience is not None and state.evals_since_best >= patience


def all_windows(
    plan: Plan, config: TrainingConfig, data: Data, collator: Collator, rank: int, first_step: int = 0
) -> Iterator[Window]:
    """The windows of all steps after `first_step`, epoch after epoch."""
    tokens, lengths = data.tokens["train"], data.lengths["train"]
    for epoch in range(first_step // plan.steps_per_epoch, plan.num_epochs):
        start = epoch * plan.steps_per_epoch
        batches = epoch_batches(lengths, plan.train_batch_size, config.seed, epoch, config.train_sampling_strategy)
        batches = batches[max(0, first_step - start) : plan.total_steps - start]
        yield from training_windows(
            tokens, batches, plan.micro_batch_size, rank, plan.world_size, collator, config.dataloader_num_workers
        )


def epoch_padding_share(plan: Plan, config: TrainingConfig, lengths: np.ndarray, multiple: int | None = None) -> float:
    """Share of padding in the first epoch's global batches."""
    batches = epoch_batches(lengths, plan.train_batch_size, config.seed, 0, config.train_sampling_strategy)
    return padding_share(lengths, batches, multiple)


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    window: Window,
    config: OptimConfig,
    seed: int,
    state: State,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward over the micro-batches of this process, then one step of AdamW and of the schedule.

    The model must be in train mode (`set_train_mode`). The loss is the sum over samples divided by the samples of the
    whole step, so that neither processes nor micro-batches nor a short last batch change it. Gradients are exchanged
    once, with the last micro-batch.

    Returns the summed loss of this process and the norm of the gradients before clipping, both on the device: reading
    them waits for the device, which is left to the caller.
    """
    loss_sum = torch.zeros((), device=accelerator.device)
    for index, micro_batch in enumerate(window.micro_batches):
        seed_everything(seed, state.step, index, accelerator.process_index)
        last = index == len(window.micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = micro_batch_loss(model, micro_batch, accelerator.device, config.label_smoothing_factor)
            # DDP averages gradients over processes; the sum is wanted.
            accelerator.backward(loss * (accelerator.num_processes / window.num_samples))
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        advance_scheduler(scheduler, config.lr_scheduler_type)
    optimizer.zero_grad()
    state.step += 1
    state.samples_seen += window.num_samples
    return loss_sum, norm if norm is not None else torch.zeros(())


def micro_batch_loss(
    model: nn.Module, micro_batch: dict[str, torch.Tensor], device: torch.device, label_smoothing: float
) -> torch.Tensor:
    """Summed cross entropy of the samples that count, in float32 and nats."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
    labels, weight = inputs.pop("labels"), inputs.pop("sample_weight")
    logits = model(**inputs).logits.float()
    return (cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing) * weight).sum()
