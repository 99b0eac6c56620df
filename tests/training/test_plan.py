"""Which step comes next, which samples it has, and what follows it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from lib.config.train import OptimConfig, TrainConfig, TrainingConfig
from lib.errors import UserError
from lib.evaluation.scores import Metrics
from lib.training.plan import Plan, build_plan
from lib.training.state import State
from tests.stepping import batches_of

TOKENS = [{"input_ids": [number], "labels": 0} for number in range(10)]


class Tokens(list):
    """Samples as the loader reads them."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def collate(rows):
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows]), "labels": torch.zeros(len(rows))}


def plan_of(**settings) -> Plan:
    return Plan(TrainingConfig(train_batch_size=4, **settings), np.ones(len(TOKENS)), logging_steps=2)


def play(plan: Plan, state: State, better: bool = True) -> list[str]:
    """The loop of train.py as words: `step N`, or `pending` for the step of a resumed run, and what follows each."""
    words = []
    for batch in plan.steps(batches_of(Tokens(TOKENS), collate), state):
        if batch is None:
            words.append("pending")
        else:
            state.step, state.pending = state.step + 1, True
            words.append(f"step {state.step}")
        words += ["log"] if plan.is_log_step(state) else []
        if plan.is_eval_step(state):
            words.append("evaluate")
            state.evals_since_best = 0 if better else state.evals_since_best + 1
        state.pending = False
        words += ["save"] if plan.is_save_step(state) else []
    return words


def test_every_epoch_ends_with_an_evaluation_and_a_checkpoint_by_default() -> None:
    steps = play(plan_of(num_train_epochs=2), State())
    assert steps == [
        *("step 1", "step 2", "log", "step 3", "log", "evaluate", "save"),
        *("step 4", "log", "step 5", "step 6", "log", "evaluate", "save"),
    ]


def test_pending_step_is_logged_evaluated_and_saved_first_and_not_made_again() -> None:
    plan = plan_of(num_train_epochs=2)
    whole = play(plan, State())
    resumed = play(plan, State(step=3, pending=True))
    assert resumed == ["pending", *whole[whole.index("step 3") + 1 :]]
    assert play(plan, State(step=3)) == whole[whole.index("step 4") :]
    assert play(plan, State(step=6, pending=True)) == ["pending", "log", "evaluate", "save"]
    assert play(plan, State(step=6)) == []


def test_resumed_run_gets_the_batches_of_an_uninterrupted_one() -> None:
    plan, batches = plan_of(num_train_epochs=2), batches_of(Tokens(TOKENS), collate)
    whole = [batch.micro_batches[0].inputs["input_ids"].tolist() for batch in plan.step_batches(batches)]
    for first in range(len(whole) + 1):
        rest = [batch.micro_batches[0].inputs["input_ids"].tolist() for batch in plan.step_batches(batches, first)]
        assert rest == whole[first:]
    for step, ids in enumerate(whole, 1):
        assert [[number] for number in plan.samples_of(step)] == ids


def test_early_stopping_ends_training_with_a_checkpoint() -> None:
    plan = plan_of(num_train_epochs=9, early_stopping_patience=2, eval_steps=1, save_steps=100)
    assert play(plan, State(), better=False)[-3:] == ["log", "evaluate", "save"]
    assert play(plan, State(), better=False).count("evaluate") == 2


@pytest.mark.parametrize(
    ("share", "steps"),
    [
        (0.5, [9, 18]),
        (1 / 6, [3, 6, 9, 12, 15, 18]),
        (0.1667, [4, 8, 12, 16, 18]),
        (0.01, [*range(1, 19)]),
        (7, [7, 14, 18]),
    ],
)
def test_share_of_all_steps_says_how_often_a_run_is_evaluated(share: float, steps: list[int]) -> None:
    """With 6 epochs of 3 steps, a sixth is an epoch."""
    plan = plan_of(num_train_epochs=6, eval_steps=share)
    assert [step for step in range(1, 19) if plan.is_eval_step(State(step=step))] == steps


def test_train_split_without_samples_is_refused() -> None:
    empty: Any = SimpleNamespace(lengths={"train": np.zeros(0)})
    with pytest.raises(UserError, match="train split is empty"):
        build_plan(TrainConfig(), empty, Metrics((), "loss"), Accelerator(cpu=True))


def plan_with(**options: Any) -> Plan:
    """The plan of 10 samples in batches of 4, 3 steps an epoch."""
    config = TrainConfig(
        training=TrainingConfig(train_batch_size=4, num_train_epochs=options.pop("num_train_epochs", 1)),
        optim=OptimConfig(**options),
    )
    data: Any = SimpleNamespace(lengths={"train": np.ones(10)})
    return build_plan(config, data, Metrics(("accuracy",), "accuracy"), Accelerator(cpu=True))


@pytest.mark.parametrize("steps", [4, 1000, 2147483647])
def test_warmup_that_is_longer_than_training_is_refused(steps: int) -> None:
    with pytest.raises(UserError, match=r"--warmup_steps .*training of 3 steps"):
        plan_with(warmup_steps=steps)
    plan_with(warmup_steps=steps, lr_scheduler_type="constant")


def test_warmup_of_all_steps_is_allowed() -> None:
    assert plan_with(warmup_steps=3).total_steps == 3


def test_more_steps_than_can_be_counted_are_refused() -> None:
    config = TrainConfig(training=TrainingConfig(train_batch_size=1, num_train_epochs=1e6))
    data: Any = SimpleNamespace(lengths={"train": np.ones(3000)})
    with pytest.raises(UserError, match="--num_train_epochs 1e"):
        build_plan(config, data, Metrics(("accuracy",), "accuracy"), Accelerator(cpu=True))
