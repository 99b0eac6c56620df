"""How much an evaluation computes at once on a device."""

import dataclasses

import numpy as np
import torch

from lib.config.sections import EVAL_SAMPLES
from lib.data.batching import Indices, chunked, grouped_batches, packed_batches
from lib.data.loader import Split
from lib.runtime.memory import halve, has_own_memory

FLAG = "--per_device_eval_batch_size"

POSITIONS = 2**15
"""Positions per forward on a GPU, at first: enough that products of 768 columns fill the largest ones several times.

A fixed number, which only a lack of memory makes smaller. Doubling it for as long as a clock says that texts get faster
would let two equal runs choose different sizes, and in the last bits different scores, of which the best model is chosen.
"""

UNITS = {"samples": "eval_batch_size", "positions": "eval_positions"}
"""What is counted, and the name of the number in the state of a run."""


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """The most per forward: samples of the longest text, or positions (rows x padded length; without padding, tokens)."""

    number: int
    unit: str = "samples"

    def __str__(self) -> str:
        if self.unit == "positions":
            return f"batches of at most {self.number:,} positions"
        return f"batches of at most {self.number:,} samples of the longest text"

    @property
    def name(self) -> str:
        """The name of the number in the state of a run."""
        return UNITS[self.unit]

    def batches(self, lengths: np.ndarray, packed: bool = False) -> list[Indices]:
        """All indices of `lengths` in batches of that size, longest first; they depend on nothing else."""
        positions = self.number * (int(lengths.max(initial=1)) if self.unit == "samples" else 1)
        return packed_batches(lengths, positions) if packed else grouped_batches(lengths, positions)

    def pieces(self, lengths: np.ndarray, packed: bool = False) -> list[Indices]:
        """The rows of a few texts in batches: as many in their order, or those of a number of positions."""
        if self.unit == "samples":
            return chunked(np.arange(len(lengths)), self.number)
        return self.batches(lengths, packed)

    def halved(self, lengths: np.ndarray, packed: bool = False) -> "BatchSize":
        """Half of what was tried on texts of `lengths`, after a lack of memory. Raises UserError if a single text was."""
        largest = min(self.number, len(lengths))
        if self.unit == "positions":
            several = [lengths[batch] for batch in self.batches(lengths, packed) if len(batch) > 1]
            taken = (int(part.sum() if packed else part.max() * len(part)) for part in several)
            largest = min(self.number, max(taken, default=0))
        return BatchSize(halve(largest, FLAG, self.unit), self.unit)


def choose_size(given: int | None, device: torch.device, of_run: BatchSize | None = None) -> BatchSize:
    """`--per_device_eval_batch_size` samples; without it, 64 on a CPU.

    On a device with its own memory, without the flag: `of_run`, with which a run was scored, else POSITIONS.
    """
    if given is None and has_own_memory(device):
        return of_run or BatchSize(POSITIONS, "positions")
    return BatchSize(given or EVAL_SAMPLES)


def split_batches(split: Split, size: BatchSize) -> list[Indices]:
    """The batches of a split, over all processes."""
    return size.batches(split.positions, split.packed)
