"""What is counted after a step and after an evaluation."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from lib.config.train import OptimConfig, TrainingConfig
from lib.data.loader import StepBatch
from lib.model.losses import plain_cross_entropy
from lib.training.learner import Learner, build_learner
from lib.training.objective import Objective
from lib.training.optimizer import learning_rate
from lib.training.plan import Plan

BATCH = StepBatch([], 8, 8.0)


def learner_of(**settings: Any) -> Learner:
    """A learner of 4 steps of 8 samples."""
    plan = Plan(TrainingConfig(train_batch_size=8, num_train_epochs=1), np.ones(32), best_metric="accuracy")
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, **settings)
    return build_learner(Accelerator(cpu=True), torch.nn.Linear(2, 2), Objective(plain_cross_entropy), plan, config)


def test_step_is_counted_and_pending_and_its_loss_and_norm_are_in_the_meter() -> None:
    learner = learner_of(lr_scheduler_type="linear")
    learner.optimizer.step()
    learner.step_schedule(torch.tensor(3.0))
    learner.count_step(BATCH, torch.tensor(16.0), torch.tensor(3.0))
    state = learner.state
    assert (state.step, state.samples_seen, state.pending, state.learning_rate) == (1, 8, True, 1.0)
    assert learning_rate(learner.optimizer) == 0.75
    values = learner.meter.read()
    assert (values["train/loss"], values["train/grad_norm"]) == (2.0, 3.0)


@pytest.mark.parametrize(("name", "rate"), [("reduce_lr_on_plateau", 0.1), ("constant", 1.0)])
def test_evaluation_is_compared_by_the_metric_of_the_plan_and_advances_schedules_that_follow_it(name, rate) -> None:
    patience = ("patience=0",) if name == "reduce_lr_on_plateau" else ()
    learner = learner_of(lr_scheduler_type=name, lr_scheduler_kwargs=patience)
    assert learner.update_best({"loss": 1.0, "accuracy": 0.8})
    assert not learner.update_best({"loss": 0.5, "accuracy": 0.7})
    assert learner.state.best_metric == 0.8
    assert learning_rate(learner.optimizer) == pytest.approx(rate)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedule_that_follows_a_metric_stays_where_it_is_while_the_metric_is_not_defined(name: str) -> None:
    learner = learner_of(lr_scheduler_type=name, lr_scheduler_kwargs=("patience=0",))
    before = learner.scheduler.state_dict()
    assert learner.update_best({"loss": 1.0, "accuracy": float("nan")})
    assert learner.scheduler.state_dict() == before
