"""Progress of training on stderr: a bar on a terminal, a line per log step elsewhere."""

import sys
import time

from accelerate import Accelerator
from tqdm import tqdm

from lib.training.learner import Learner
from lib.training.state import State


class Progress:
    """Shows steps, loss, learning rate, speed and time left on the main process, on stderr."""

    def __init__(self, accelerator: Accelerator, total_steps: int, state: State) -> None:
        self.shown, self.total, self.first = accelerator.is_main_process, total_steps, state.step
        self.started, self.seconds_before = time.perf_counter(), state.train_seconds
        on_terminal = self.shown and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=state.step, unit="step", dynamic_ncols=True) if on_terminal else None

    def step(self, state: State) -> None:
        """One more step; adds to the training time in `state`, which includes the time before an interruption."""
        self.count_seconds(state)
        if self.bar is not None:
            self.bar.update()

    def count_seconds(self, state: State) -> None:
        state.train_seconds = self.seconds_before + time.perf_counter() - self.started

    def show(self, learner: Learner) -> dict[str, float]:
        """Show and return loss, gradient norm, learning rate and speed since the last log line.

        Raises UserError on every process if a loss or gradient was not finite.
        """
        state, plan = learner.state, learner.plan
        values = learner.meter.read()
        self.count_seconds(state)  # again: only now has a GPU done the steps that it was given
        values |= {"train/learning_rate": state.learning_rate, "train/epoch": state.step / plan.steps_per_epoch}
        loss, rate = f"{values['train/loss']:.4f}", f"{state.learning_rate:.2e}"
        speed = f"{values['train/samples_per_second']:.0f}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss}, lr {rate}, {speed} samples/s")
        elif self.shown:
            seconds = (time.perf_counter() - self.started) / max(1, state.step - self.first) * (self.total - state.step)
            print(
                f"step {state.step}/{self.total}  loss {loss}  lr {rate}  {speed} samples/s  "
                f"{tqdm.format_interval(seconds)} left",
                file=sys.stderr,
                flush=True,
            )
        return values

    def write(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif self.shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar: what is printed after it begins a line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
