"""Which samples form which step: pure functions of (lengths, batch size, seed, epoch), the same on every machine.

epoch_batches     global batches of one epoch, each sample once
rank_slice        the part of a batch that one process works on
micro_batches     that part in pieces a device can hold
training_windows  the above as padded tensors, one window per optimizer step
eval_batches      batches of like length, whatever the number of processes
"""

import math
from collections.abc import Sequence

import numpy as np

Indices = np.ndarray

BLOCK = 100
"""Batches whose samples are sorted together: enough to fill batches with like lengths, few enough to keep them random."""

ALIKE = 0.92
"""Texts to evaluate that are at least so long, compared with the longest of their batch, are padded rather than cut off."""


def permutation(n: int, *key: int) -> Indices:
    """A permutation of range(n) that depends on `key` alone.

    NumPy keeps the bit stream of PCG64 and the hash of SeedSequence stable between versions; `Generator.permutation` it
    does not (NEP 19), hence the sort of raw draws.
    """
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(draws, kind="stable")


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, strategy: str = "group_by_length"
) -> list[Indices]:
    """Global batches of an epoch: every index of `lengths` once, all batches full but one.

    With `group_by_length`, blocks of shuffled samples are sorted by length and cut, and the finished batches are shuffled
    again, so that short and long batches follow each other at random.
    """
    order = permutation(len(lengths), seed, epoch, 0)
    if strategy == "random":
        return cut(order, batch_size)
    blocks = cut(order, BLOCK * batch_size)
    batches = [batch for block in blocks for batch in cut(sort_by_length(block, lengths), batch_size)]
    return [batches[i] for i in permutation(len(batches), seed, epoch, 1)]


def sort_by_length(indices: Indices, lengths: np.ndarray) -> Indices:
    return indices[np.argsort(lengths[indices], kind="stable")]


def cut(indices: Indices, size: int) -> list[Indices]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def rank_slice(batch: Indices, rank: int, world_size: int) -> Indices:
    """The contiguous part of `batch` for one process; parts differ by one sample at most and may be empty."""
    start, stop = (len(batch) * r // world_size for r in (rank, rank + 1))
    return batch[start:stop]


def micro_batches(part: Indices, size: int) -> list[Indices]:
    """`part` in pieces of at most `size`; an empty part is one empty piece, since every process takes part in a step."""
    return cut(part, size) or [part]


def eval_batches(lengths: np.ndarray, batch_size: int) -> list[Indices]:
    """All indices in batches of like length, longest first, so that a lack of memory shows at once.

    No batch takes more positions than `batch_size` of the longest texts: the shorter texts are, the more of them go
    together. From a quarter of these on, a batch ends where texts get shorter than `ALIKE` of its longest.
    """
    order = sort_by_length(np.arange(len(lengths)), lengths)[::-1]
    rising = -lengths[order]
    batches: list[Indices] = []
    start, positions = 0, batch_size * int(lengths.max(initial=1))
    while start < len(order):
        longest = max(1, -int(rising[start]))
        alike = int(np.searchsorted(rising, -math.ceil(ALIKE * longest), side="right"))
        most = positions // longest
        stop = min(start + most, max(alike, start + max(1, most // 4)))
        batches.append(order[start:stop])
        start = stop
    return batches


def padding_share(
    lengths: np.ndarray, pieces: Sequence[Indices], multiple: int | None = None, window: int | None = None
) -> float:
    """Share of padding among the positions that `pieces` occupy once each is padded to its longest member.

    Samples of more than `window` tokens are windows of so many and a last one.
    """
    if not len(lengths):
        return 0.0
    counts = count_windows(lengths, window)
    longest = np.minimum(lengths, window or lengths)
    positions = [round_up(int(longest[piece].max()), multiple) * counts[piece].sum() for piece in pieces if len(piece)]
    return 1.0 - sum(int(lengths[piece].sum()) for piece in pieces) / float(sum(positions))


def count_windows(lengths: np.ndarray, window: int | None) -> np.ndarray:
    return np.ones_like(lengths) if window is None else np.maximum(1, -(-lengths // window))


def round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple
