"""What a person sees while a run trains: a bar on a terminal, a plain line now and then elsewhere."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from lib.data.batching import Window
from lib.runtime.processes import lowest
from lib.training.plan import State


class Interval:
    """Sums on the device since the last reset: adding waits for nothing, reading waits once."""

    def __init__(self, accelerator: Accelerator, explain: Callable[[int, float], Exception]) -> None:
        """`explain` makes the error of a step and its learning rate when that step's loss or gradient is not finite."""
        self.accelerator, self.explain = accelerator, explain
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(2, device=self.accelerator.device)
        self.bad_step = torch.zeros((), device=self.accelerator.device)
        self.rates: dict[int, float] = {}
        self.samples = self.steps = 0
        self.weight = 0.0
        self.started = time.perf_counter()

    def add(self, loss_sum: torch.Tensor, grad_norm: torch.Tensor, window: Window, step: int, rate: float) -> None:
        """One step more: its summed loss on this process, its gradient norm, its learning rate."""
        norm = grad_norm.to(self.sums.device)
        self.sums[0] += loss_sum
        self.sums[1] += norm
        bad = (self.bad_step == 0) & ~(torch.isfinite(loss_sum) & torch.isfinite(norm))
        self.bad_step = torch.where(bad, float(step), self.bad_step)
        self.rates[step] = rate
        self.samples += window.num_samples
        self.weight += window.weight
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Weighted mean loss of the samples since the reset over all processes, mean gradient norm, samples per second.

        Raises on every process what `explain` makes, when one of them met a loss or gradient that is not finite.
        """
        loss, norm = self.accelerator.reduce(self.sums, "sum").tolist()
        if not math.isfinite(loss + norm):
            step = lowest(self.accelerator, int(self.bad_step) or sys.maxsize)
            raise self.explain(step, self.rates[step])
        seconds = time.perf_counter() - self.started
        return {
            "train/loss": loss / self.weight,
            "train/grad_norm": norm / self.steps / self.accelerator.num_processes,
            "train/samples_per_second": self.samples / seconds,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the sums of each process, so that they go on bit by bit. Raises as `read` does."""
        if self.steps:
            self.read()
        table = torch.zeros(self.accelerator.num_processes, 2, device=self.accelerator.device)
        table[self.accelerator.process_index] = self.sums
        sums = self.accelerator.reduce(table, "sum").tolist()
        seconds = time.perf_counter() - self.started
        counts = {"samples": self.samples, "steps": self.steps, "weight": self.weight}
        return {"sums": sums, "seconds": seconds} | counts

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `state`, also on another number of processes."""
        self.reset()
        sums = torch.tensor(saved["sums"], device=self.accelerator.device)
        rank = self.accelerator.process_index
        if len(sums) == self.accelerator.num_processes:
            self.sums = sums[rank]
        else:  # losses are summed over processes, norms are the same on all
            self.sums = torch.stack([sums[:, 0].sum() * (rank == 0), sums[:, 1].mean()])
        self.samples, self.steps, self.weight = saved["samples"], saved["steps"], saved["weight"]
        self.started -= saved["seconds"]


class Progress:
    """Shows steps, loss, learning rate, speed and time left on the main process, on stderr."""

    def __init__(self, accelerator: Accelerator, total_steps: int, state: State) -> None:
        self.shown, self.total, self.first = accelerator.is_main_process, total_steps, state.step
        self.started, self.seconds_before = time.perf_counter(), state.train_seconds
        on_terminal = self.shown and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=state.step, unit="step", dynamic_ncols=True) if on_terminal else None

    def step(self, state: State) -> None:
        """One step more; `state` learns the time spent in training so far, also before an interruption."""
        state.train_seconds = self.seconds_before + time.perf_counter() - self.started
        if self.bar is not None:
            self.bar.update()

    def show(self, step: int, values: dict[str, float]) -> None:
        """Loss, learning rate and speed of the last interval."""
        loss, rate = f"{values['train/loss']:.4f}", f"{values['train/learning_rate']:.2e}"
        speed = f"{values['train/samples_per_second']:.0f}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss}, lr {rate}, {speed} samples/s")
        elif self.shown:
            left = (time.perf_counter() - self.started) / max(1, step - self.first) * (self.total - step)
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

    def close(self, step: int, metric: str) -> None:
        """End at `step`, which is early when `metric` was no longer better."""
        if step < self.total:
            self.write(
                f"stopped early at step {step}: no better {metric} for as long as --early_stopping_patience allows"
            )
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
