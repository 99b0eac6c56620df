"""What each peer reports of its run, as the last line on stdout, so that all are measured alike."""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Measures:
    """Times and counts of one run.

    Moments are seconds since 1970, so that whoever started the process can subtract its own start. On a GPU its work is
    waited for before a clock is read: at the first step, and at the ends of epochs and of evaluations.
    """

    def __init__(self) -> None:
        self.first_step_at: float | None = None
        self.train_seconds = self.eval_seconds = 0.0
        self.train_samples = self.eval_samples = 0
        self.evaluations: list[tuple[float, float]] = []
        self.tokens = self.positions = 0

    def counting(self, collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """`collator`, with samples and padding of what it makes counted: for the batches of training."""

        def collate(rows: list[Any]) -> Any:
            batch = collator(rows)
            self.train_samples += len(rows)
            self.tokens += int(batch["attention_mask"].sum())
            self.positions += batch["attention_mask"].numel()
            return batch

        return collate

    def begin_epoch(self) -> None:
        self.epoch_started = time.perf_counter()

    def end_epoch(self) -> None:
        """All steps of the epoch are made; its evaluation comes after."""
        wait_for_gpu()
        self.train_seconds += time.perf_counter() - self.epoch_started

    def step(self) -> None:
        """One optimizer step is made."""
        if self.first_step_at is None:
            wait_for_gpu()
            self.first_step_at = time.time()

    @contextlib.contextmanager
    def evaluating(self, samples: int) -> Iterator[None]:
        """The forward passes over `samples` samples whose tokens are at hand."""
        started = time.perf_counter()
        yield
        wait_for_gpu()
        self.eval_seconds += time.perf_counter() - started
        self.eval_samples += samples

    def evaluated(self, accuracy: float) -> None:
        """The validation accuracy after an epoch is known."""
        self.evaluations.append((time.time(), accuracy))

    def report(self, **more: Any) -> str:
        """One line of JSON: all measures, and what the script adds."""
        return json.dumps(
            {
                "first_step_at": self.first_step_at,
                "train_seconds": self.train_seconds,
                "train_samples": self.train_samples,
                "eval_seconds": self.eval_seconds,
                "eval_samples": self.eval_samples,
                "evaluations": self.evaluations,
                "padding_share": 1 - self.tokens / self.positions if self.positions else None,
                "peak_memory_gib": peak_memory_gib(),
                **more,
            }
        )


def wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
