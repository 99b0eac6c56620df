"""The time of training, and what the start block says of few samples."""

from types import SimpleNamespace

import pytest
import torch

from lib.config.train import TrainingConfig
from lib.run import progress
from lib.run.introduction import few_samples
from lib.run.progress import Progress
from lib.training.state import State


def test_training_time_counts_until_the_device_has_done_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is given a step in a millisecond and works on it for longer; reading the loss waits for it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    state = State(step=1, train_seconds=5.0)

    def read() -> dict[str, float]:
        clock.now += 7.0
        return {"train/loss": 1.0, "train/samples_per_second": 1.0}

    shown = Progress(SimpleNamespace(is_main_process=False), 10, state)
    clock.now += 1.0
    shown.step(state)
    assert state.train_seconds == 6.0
    shown.show(SimpleNamespace(state=state, plan=SimpleNamespace(steps_per_epoch=10), meter=SimpleNamespace(read=read)))
    assert state.train_seconds == 13.0


@pytest.mark.parametrize(
    ("device", "processes", "batch_size", "warned"),
    [("cuda", 8, 32, True), ("cuda", 2, 32, False), ("cuda", 1, 8, False), ("cpu", 8, 32, False)],
)
def test_few_samples_for_each_gpu_are_warned_of(device: str, processes: int, batch_size: int, warned: bool) -> None:
    plan = SimpleNamespace(config=TrainingConfig(train_batch_size=batch_size), world_size=processes)
    notes = few_samples(SimpleNamespace(plan=plan, accelerator=SimpleNamespace(device=torch.device(device))))
    assert any("--train_batch_size" in note and "4 samples" in note for note in notes) == warned
