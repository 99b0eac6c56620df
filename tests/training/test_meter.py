"""The sums between two log lines: equal after a resume, and the first step that is not finite is named."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from lib.config.train import TrainingConfig
from lib.data.loader import StepBatch
from lib.errors import UserError
from lib.training.meter import Meter
from lib.training.plan import Plan
from lib.training.state import State

BATCH = StepBatch([], 8, 8.0)
PLAN = Plan(TrainingConfig(train_batch_size=8), np.ones(24))


@pytest.fixture
def meter() -> Meter:
    return Meter(Accelerator(cpu=True), PLAN)


def add(meter: Meter, step: int, loss: float, norm: float = 1.0) -> None:
    meter.add(torch.tensor(loss), torch.tensor(norm), BATCH, State(step=step, learning_rate=step / 100))


def test_means_are_per_sample_and_per_step(meter):
    for step, loss in ((1, 8.0), (2, 24.0)):
        add(meter, step, loss, norm=step)
    values = meter.read()
    assert (values["train/loss"], values["train/grad_norm"]) == (2.0, 1.5)
    assert meter.read()["train/loss"] == 2.0  # reading changes nothing
    meter.reset()
    add(meter, 3, 4.0)
    assert meter.read()["train/loss"] == 0.5


def test_sums_continue_bit_by_bit_after_a_checkpoint(meter):
    for step in range(1, 4):
        add(meter, step, 0.1 * step, 0.3)
    saved = meter.state()
    later = Meter(meter.accelerator, PLAN)
    later.restore(saved)
    for each in (meter, later):
        add(each, 4, 0.7, 0.9)
    assert torch.equal(meter.sums, later.sums)
    assert (later.samples, later.steps) == (32, 4)


def test_sums_of_two_processes_continue_on_one(meter):
    meter.restore({"sums": [[3.0, 2.0], [5.0, 2.0]], "samples": 16, "steps": 2, "weight": 16.0, "seconds": 1.0})
    assert meter.sums.tolist() == [8.0, 2.0]
    values = meter.read()
    assert (values["train/loss"], values["train/grad_norm"]) == (0.5, 1.0)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf")), (float("inf"), float("nan"))])
def test_first_step_that_is_not_finite_is_named_with_its_learning_rate(meter, loss, norm):
    add(meter, 1, 1.0)
    add(meter, 2, loss, norm)
    add(meter, 3, float("nan"))
    for look in (meter.read, meter.state):
        with pytest.raises(UserError, match=r"not finite at step 2 \(learning rate 0\.02\)") as caught:
            look()
        assert " ".join(map(str, sorted(PLAN.samples_of(2)))) in str(caught.value)


def test_sum_that_overflows_is_reported_as_not_finite(meter):
    for step in (1, 2):
        add(meter, step, 3e38)
    with pytest.raises(UserError, match="not finite at step 2 "):
        meter.read()


def test_speed_counts_the_time_before_a_checkpoint_and_none_before_training(meter, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    meter.restore({"sums": [[8.0, 2.0]], "samples": 8, "steps": 1, "weight": 8.0, "seconds": 3.0})
    now = 100.0  # frozen features were computed
    meter.start_clock()
    now = 101.0
    assert meter.read()["train/samples_per_second"] == 2.0
    assert meter.state()["seconds"] == 4.0
    meter.reset()
    add(meter, 2, 1.0)
    now = 103.0
    assert meter.read()["train/samples_per_second"] == 4.0
