"""What a person sees while a run trains: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

import torch
from accelerate import Accelerator
from tqdm import tqdm

from lib.batching import Window


class Interval:
    """Sums on the device since the last reading: adding waits for nothing, reading waits once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(2, device=self.accelerator.device)
        self.samples = self.steps = 0
        self.started = time.perf_counter()

    def add(self, loss_sum: torch.Tensor, grad_norm: torch.Tensor, window: Window) -> None:
        self.sums[0] += loss_sum
        self.sums[1] += grad_norm.to(self.sums.device)
        self.samples += window.num_samples
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Mean loss per sample over the interval and all processes, mean gradient norm, samples per second; then reset."""
        loss, norm = self.accelerator.reduce(self.sums, "sum").tolist()
        seconds = time.perf_counter() - self.started
        values = {
            "train/loss": loss / self.samples,
            "train/grad_norm": norm / self.steps / self.accelerator.num_processes,
            "train/samples_per_second": self.samples / seconds,
        }
        self.reset()
        return values


class Progress:
    """Shows steps, loss, learning rate, speed and time left on the main process, on stderr."""

    def __init__(self, accelerator: Accelerator, total_steps: int) -> None:
        self.shown, self.total, self.started = accelerator.is_main_process, total_steps, time.perf_counter()
        on_terminal = self.shown and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True) if on_terminal else None

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def show(self, step: int, values: dict[str, float]) -> None:
        """Loss, learning rate and speed of the last interval."""
        loss, rate = f"{values['train/loss']:.4f}", f"{values['train/learning_rate']:.2e}"
        speed = f"{values['train/samples_per_second']:.0f}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss}, lr {rate}, {speed} samples/s")
        elif self.shown:
            left = (time.perf_counter() - self.started) / step * (self.total - step)
            print(
                f"step {step}/{self.total}  loss {loss}  lr {rate}  {speed} samples/s  {clock(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def write(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif self.shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
