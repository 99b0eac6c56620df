"""Gradients of a step of a model in shards, which FSDP sums over processes within each backward pass."""

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator

from lib.data.loader import MicroBatch
from lib.runtime.processes import lowest, lowest_of_each


class ShardedGradients:
    """Each process's part of the sums of gradients: those of every micro-batch leave at once, for none has room for all.

    Replicas add theirs after the last one.
    """

    def __init__(self, accelerator: Accelerator, model: Any) -> None:
        self.accelerator, self.model = accelerator, model

    def pad(self, pieces: list[MicroBatch]) -> list[MicroBatch]:
        """As many micro-batches on every process, those that are missing with weight 0: all gather a layer together."""
        missing = -lowest(self.accelerator, -len(pieces)) - len(pieces)
        first = pieces[0].split(1)[0]
        return pieces + [dataclasses.replace(first, weights=torch.zeros_like(first.weights))] * missing

    def begin(self) -> None:
        """An attempt at a step begins: no parameter has a gradient yet."""
        self.model.set_requires_all_reduce(False)

    def begin_last(self) -> None:
        """The last micro-batch of the attempt comes next."""
        self.model.set_requires_all_reduce(True)

    def finish(self, failed: bool, relaxed: bool) -> tuple[bool, bool]:
        """Whether all processes must repeat the attempt, and False: one that was short of memory cannot ask for it."""
        (done,) = lowest_of_each(self.accelerator, [not (failed or relaxed)])
        if not done:  # all of them stopped at the same operation
            self.model.reset_iter_state()
        return not done, False
