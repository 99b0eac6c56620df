"""The objects of train.py, for tests that run single steps."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from lib.config.train import TrainConfig
from lib.data.load import Data, load_data
from lib.data.loader import Batches, StepBatch, build_collator
from lib.evaluation.scores import Metrics
from lib.model.build import build_classifier
from lib.model.load import load_tokenizer
from lib.model.losses import Loss, plain_cross_entropy
from lib.runtime.seeds import seed_everything
from lib.training.learner import Learner, build_learner
from lib.training.objective import Objective, build_objective
from lib.training.plan import Plan, build_plan
from train import forward_backward, train_step

METRICS = Metrics(("accuracy",), "accuracy")


@dataclasses.dataclass
class Experiment:
    """What `main` has built before the first step."""

    config: TrainConfig
    learner: Learner
    batches: Batches
    plan: Plan

    def step(self, batch: StepBatch) -> tuple[float, float]:
        """(mean loss over all processes, gradient norm) of one step, which is the only one in the meter afterwards."""
        self.learner.meter.reset()
        train_step(self.learner, batch, self.config)
        values = self.learner.meter.read()
        return values["train/loss"], values["train/grad_norm"]

    def train(self) -> list[tuple[float, float]]:
        return [self.step(batch) for batch in self.plan.step_batches(self.batches)]


def build_experiment(config: TrainConfig, accelerator: Accelerator, data: Data | None = None) -> Experiment:
    tokenizer = load_tokenizer(config.model)
    data = data or load_data(config.data, tokenizer)
    seed_everything(config.training.seed)
    model, _ = build_classifier(config, data, tokenizer, accelerator.device, accelerator.mixed_precision)
    plan, objective = build_plan(config, data, METRICS, accelerator), build_objective(config.objective, data)
    learner = build_learner(accelerator, model, objective, plan, config.optim)
    collator = build_collator(tokenizer, accelerator.mixed_precision, accelerator.device)
    return Experiment(config, learner, Batches(data, collator, objective.weights), plan)


def batches_of(tokens: Any, collator: Any, weights: Any = None) -> Batches:
    """Batches of training samples `tokens`, without a data set."""
    data: Any = SimpleNamespace(tokens={"train": tokens})
    return Batches(data, collator, weights)


def add_gradients(
    model: torch.nn.Module, batch: StepBatch, loss: Loss = plain_cross_entropy, positions: int | None = None
) -> float:
    """Forward and backward of one process's share of a step, cut to `positions`; returns its summed loss."""
    learner: Any = SimpleNamespace(accelerator=Accelerator(cpu=True), model=model, objective=Objective(loss))
    return sum(float(forward_backward(learner, piece, batch.weight)) for piece in batch.pieces(positions))
