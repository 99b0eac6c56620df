"""Loss, gradient norm and speed since the last log line, summed on the device."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from lib.config.train import TrainConfig
from lib.data.load import Data
from lib.data.loader import Window
from lib.errors import UserError
from lib.runtime.processes import lowest
from lib.training.plan import Plan, step_indices


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


def explain_not_finite(step: int, rate: float, plan: Plan, config: TrainConfig, data: Data) -> UserError:
    """The message that ends a run whose loss or gradient is not finite."""
    indices = step_indices(plan, config.training, data.lengths["train"], step)
    return UserError(
        f"the loss or its gradient is not finite at step {step} (learning rate {rate:g}), and nothing of that "
        f"step was learnt. Its samples are rows {' '.join(map(str, sorted(indices)))} of the train split, counted from 0. "
        "Checkpoints and the best model are those from before; try a lower --learning_rate, a smaller --max_grad_norm, or "
        "--mixed_precision no."
    )
