"""Which samples form a batch: pure functions of lengths, batch size, seed and epoch, the same on every machine.

epoch_batches   the batches of one training epoch, over all processes
rank_slice      the part of a batch that one process works on
micro_batches   that part in pieces that fit a device
grouped_batches the batches of an evaluation
packed_batches  those of an evaluation without padding
padding_share   how much of such batches is padding
"""

import math
from collections.abc import Sequence

import numpy as np

BATCHES_PER_MEGABATCH = 100
"""Batches whose samples are sorted by length together: enough for equal lengths, few enough for random batches."""

MIN_LENGTH_RATIO = 0.92
"""An evaluation batch ends at the first text shorter than this share of its longest."""

ROUNDED = 128
"""Tokens from which on the length of a batch is rounded up, where a multiple is asked for.

Below, it would cost more than it gains: of texts of 25 tokens, 11 % more positions in every product, for aligned rows in
attention's own, which are 1 % of a step there.
"""

Indices = np.ndarray
"""Row numbers of a split."""


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, strategy: str = "group_by_length"
) -> list[Indices]:
    """The batches of an epoch: every index of `lengths` once, all batches full but one.

    `group_by_length` sorts the shuffled samples by length within mega-batches, splits these into batches and shuffles the
    batches, so that long and short ones alternate at random. `random` only shuffles the samples.
    """
    order = permutation(len(lengths), seed, epoch, 0)
    if strategy == "random":
        return chunked(order, batch_size)
    megabatches = chunked(order, BATCHES_PER_MEGABATCH * batch_size)
    batches = [batch for group in megabatches for batch in chunked(sort_by_length(group, lengths), batch_size)]
    return [batches[i] for i in permutation(len(batches), seed, epoch, 1)]


def rank_slice(batch: Indices, rank: int, world_size: int) -> Indices:
    """The contiguous part of `batch` for one process; parts differ by one sample at most and may be empty."""
    start, stop = (len(batch) * r // world_size for r in (rank, rank + 1))
    return batch[start:stop]


def micro_batches(part: Indices, size: int) -> list[Indices]:
    """`part` in pieces of at most `size`; an empty part is one empty piece, since every process takes part in a step."""
    return chunked(part, size) or [part]


def grouped_batches(lengths: np.ndarray, positions: int) -> list[Indices]:
    """All indices in batches of similar length, longest first, so that out of memory happens in the first batch.

    No batch has more than `positions`, or it has one text: a batch of shorter texts holds more of them.
    Once it holds a quarter of what fits, it ends at the first text shorter than MIN_LENGTH_RATIO of its longest.
    """
    order = sort_by_length(np.arange(len(lengths)), lengths)[::-1]
    negated = -lengths[order]
    batches: list[Indices] = []
    start = 0
    while start < len(order):
        longest = max(1, -int(negated[start]))
        similar = int(np.searchsorted(negated, -math.ceil(MIN_LENGTH_RATIO * longest), side="right"))
        most = max(1, positions // longest)
        stop = min(start + most, max(similar, start + max(1, most // 4)))
        batches.append(order[start:stop])
        start = stop
    return batches


def packed_batches(lengths: np.ndarray, tokens: int) -> list[Indices]:
    """All indices in batches of at most `tokens` tokens, or of one text, longest first.

    Texts of any lengths stand in one row, so that all batches but the last are about full.
    """
    order = sort_by_length(np.arange(len(lengths)), lengths)[::-1]
    ends = np.cumsum(lengths[order])
    batches: list[Indices] = []
    start = used = 0
    while start < len(order):
        stop = max(start + 1, int(np.searchsorted(ends, used + tokens, side="right")))
        batches.append(order[start:stop])
        start, used = stop, int(ends[stop - 1])
    return batches


def padding_share(
    lengths: np.ndarray, pieces: Sequence[Indices], multiple: int | None = None, window: int | None = None
) -> float:
    """Share of padding among the positions of `pieces`, each padded to its longest member.

    From ROUNDED tokens on, its length is rounded up to `multiple`. A sample of more than `window` tokens takes several rows
    of at most `window`.
    """
    pieces = [piece for piece in pieces if len(piece)]
    if not pieces:
        return 0.0
    order, starts = np.concatenate(pieces), np.cumsum([0, *map(len, pieces[:-1])])
    taken, multiple = lengths[order], multiple or 1
    longest = np.maximum.reduceat(np.minimum(taken, window or taken), starts)
    rows = np.add.reduceat(count_windows(taken, window), starts)
    longest = np.where(longest < ROUNDED, longest, -(-longest // multiple) * multiple)
    positions = int((longest * rows).sum())
    return 1.0 - int(taken.sum()) / float(positions)


def count_windows(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """How many windows of at most `window` tokens each sample takes; one without windows."""
    return np.ones_like(lengths) if window is None else np.maximum(1, -(-lengths // window))


def sort_by_length(indices: Indices, lengths: np.ndarray) -> Indices:
    """`indices`, shortest first; equal lengths keep their order."""
    return indices[np.argsort(lengths[indices], kind="stable")]


def chunked(indices: Indices, size: int) -> list[Indices]:
    """`indices` in pieces of `size`; the last may be shorter."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def permutation(n: int, *key: int) -> Indices:
    """A permutation of range(n) that depends on `key` alone, on every machine and NumPy version.

    NumPy keeps the raw draws of PCG64 and SeedSequence stable, but not `Generator.permutation` (NEP 19).
    """
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(draws, kind="stable")
