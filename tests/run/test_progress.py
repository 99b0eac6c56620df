"""The sums between two log lines: exact over interruptions, and the first bad step is found without waiting each step."""

import pytest
import torch
from accelerate import Accelerator

from lib.data.loader import Window
from lib.training.meter import Interval

WINDOW = Window([], 8, 8.0)


class Bad(Exception):
    pass


@pytest.fixture
def interval() -> Interval:
    return Interval(Accelerator(cpu=True), lambda step, rate: Bad(step, rate))


def add(interval: Interval, step: int, loss: float, norm: float = 1.0) -> None:
    interval.add(torch.tensor(loss), torch.tensor(norm), WINDOW, step, step / 100)


def test_means_are_per_sample_and_per_step(interval):
    for step, loss in ((1, 8.0), (2, 24.0)):
        add(interval, step, loss, norm=step)
    values = interval.read()
    assert (values["train/loss"], values["train/grad_norm"]) == (2.0, 1.5)
    assert interval.read()["train/loss"] == 2.0  # reading changes nothing
    interval.reset()
    add(interval, 3, 4.0)
    assert interval.read()["train/loss"] == 0.5


def test_sums_go_on_bit_by_bit_after_a_checkpoint(interval):
    for step in range(1, 4):
        add(interval, step, 0.1 * step, 0.3)
    saved = interval.state()
    later = Interval(interval.accelerator, interval.explain)
    later.restore(saved)
    for each in (interval, later):
        add(each, 4, 0.7, 0.9)
    assert torch.equal(interval.sums, later.sums)
    assert (later.samples, later.steps) == (32, 4)


def test_sums_of_two_processes_go_on_on_one(interval):
    interval.restore({"sums": [[3.0, 2.0], [5.0, 2.0]], "samples": 16, "steps": 2, "weight": 16.0, "seconds": 1.0})
    assert interval.sums.tolist() == [8.0, 2.0]
    values = interval.read()
    assert (values["train/loss"], values["train/grad_norm"]) == (0.5, 1.0)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf")), (float("inf"), float("nan"))])
def test_the_first_bad_step_is_named_with_its_learning_rate(interval, loss, norm):
    add(interval, 1, 1.0)
    add(interval, 2, loss, norm)
    add(interval, 3, float("nan"))
    for look in (interval.read, interval.state):
        with pytest.raises(Bad) as caught:
            look()
        assert caught.value.args == (2, 0.02)
