"""Loss, gradient norm and speed since the last log line, summed on the device."""

import math
import sys
import time
from typing import Any

import torch
from accelerate import Accelerator

from lib.data.loader import StepBatch
from lib.errors import UserError
from lib.runtime.processes import lowest
from lib.training.plan import Plan
from lib.training.state import State


class Meter:
    """Sums since the last reset: adding does not wait for the device, reading waits once."""

    def __init__(self, accelerator: Accelerator, plan: Plan) -> None:
        self.accelerator, self.plan = accelerator, plan
        self.reset()

    def reset(self) -> None:
        """Begin new sums, now."""
        self.sums = torch.zeros(2, device=self.accelerator.device)
        """Summed loss of this process, and gradient norm."""
        self.bad_step = torch.zeros((), device=self.accelerator.device)
        """The first step that made the sums NaN or infinite; 0: none."""
        self.rates: dict[int, float] = {}
        """Learning rate by step."""
        self.samples = self.steps = 0
        self.weight = self.seconds_before = 0.0
        self.start_clock()

    def start_clock(self) -> None:
        """Count the time from now on; what a checkpoint has counted is kept."""
        self.started = time.perf_counter()

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def add(self, loss_sum: torch.Tensor, grad_norm: torch.Tensor, batch: StepBatch, state: State) -> None:
        """Add a step that `state` already counts: its summed loss on this process and its gradient norm."""
        self.sums[0] += loss_sum
        self.sums[1] += grad_norm.to(self.sums.device)
        bad = (self.bad_step == 0) & ~self.sums.isfinite().all()
        self.bad_step = torch.where(bad, float(state.step), self.bad_step)
        self.rates[state.step] = state.learning_rate
        self.samples += batch.num_samples
        self.weight += batch.weight
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Weighted mean loss of the samples since the reset over all processes, mean gradient norm, samples per second.

        Raises UserError on every process if a loss or gradient of any process was not finite.
        """
        loss, norm = self.accelerator.reduce(self.sums, "sum").tolist()
        if not math.isfinite(loss + norm):
            step = lowest(self.accelerator, int(self.bad_step) or sys.maxsize)
            raise not_finite(self.plan, step, self.rates[step])
        return {
            "train/loss": loss / self.weight,
            "train/grad_norm": norm / self.steps / self.accelerator.num_processes,
            "train/samples_per_second": self.samples / self.seconds(),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint saves: the sums of each process, so that they continue bit by bit. Raises as `read` does."""
        if self.steps:
            self.read()
        table = torch.zeros(self.accelerator.num_processes, 2, device=self.accelerator.device)
        table[self.accelerator.process_index] = self.sums
        sums = self.accelerator.reduce(table, "sum").tolist()
        counts = {"samples": self.samples, "steps": self.steps, "weight": self.weight}
        return {"sums": sums, "seconds": self.seconds()} | counts

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from `state`, also on another number of processes."""
        self.reset()
        sums = torch.tensor(saved["sums"], device=self.accelerator.device)
        rank = self.accelerator.process_index
        if len(sums) == self.accelerator.num_processes:
            self.sums = sums[rank]
        else:  # losses are summed over processes, norms are the same on all
            self.sums = torch.stack([sums[:, 0].sum() * (rank == 0), sums[:, 1].mean()])
        self.samples, self.steps, self.weight = saved["samples"], saved["steps"], saved["weight"]
        self.seconds_before = saved["seconds"]


def not_finite(plan: Plan, step: int, rate: float) -> UserError:
    """The error that ends a run if a loss or gradient is not finite."""
    return UserError(
        f"the loss or its gradient is not finite at step {step} (learning rate {rate:g}), and that step changed nothing. "
        f"Its samples are rows {' '.join(map(str, sorted(plan.samples_of(step))))} of the train split, counted from 0. "
        "Checkpoints and the best model are those from before; try a lower --learning_rate, a smaller --max_grad_norm, or "
        "--mixed_precision no."
    )
