"""Which samples form which step: pure functions of (lengths, batch size, seed, epoch), the same on every machine.

epoch_batches     global batches of one epoch, each sample once
rank_slice        the part of a batch that one process works on
micro_batches     that part in pieces a device can hold
training_windows  the above as padded tensors, one window per optimizer step
eval_batches      batches of like length, whatever the number of processes
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from lib.runtime.signals import quiet_worker

Indices = np.ndarray
Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]

PER_SAMPLE = ("labels", "sample_weight", "num_windows")
"""What a batch holds once a sample; all else it holds once a window, of which a long text may have several."""

BLOCK = 100
"""Batches whose samples are sorted together: enough to fill batches with like lengths, few enough to keep them random."""

ALIKE = 0.92
"""Texts to evaluate that are at least so long, compared with the longest of their batch, are padded rather than cut off."""


@dataclasses.dataclass(frozen=True)
class Window:
    """All that one process computes for one optimizer step.

    `micro_batches` holds padded tensors and, under `sample_weight`, the weight of each sample, 0.0 for a stand-in;
    `num_samples` counts the samples of the step over all processes, `weight` is the sum of their weights.
    """

    micro_batches: list[dict[str, torch.Tensor]]
    num_samples: int
    weight: float


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


class WindowCollator(DataCollatorWithPadding):
    """Pads a batch; where samples have `num_windows`, their windows below each other."""

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        if "num_windows" not in features[0]:
            return super().__call__(features)
        names = [name for name in features[0] if name not in PER_SAMPLE]
        rows = [{name: sample[name][i] for name in names} for sample in features for i in range(sample["num_windows"])]
        batch = super().__call__(rows)
        for name in PER_SAMPLE:
            if name in features[0]:
                batch[name] = torch.tensor([sample[name] for sample in features])
        return batch


def build_collator(
    tokenizer: Any, mixed_precision: str, device: torch.device, length: int | None = None
) -> WindowCollator:
    """Pads a batch to its longest member, rounded up to 8 where tensor cores want it, or to a fixed `length`."""
    if length is not None:
        return WindowCollator(tokenizer, padding="max_length", max_length=length)
    tensor_cores = device.type == "cuda" and mixed_precision in ("fp16", "bf16")
    return WindowCollator(tokenizer, pad_to_multiple_of=8 if tensor_cores else None)


def build_loader(
    dataset: Any, pieces: Sequence[Indices], collator: Collator, num_workers: int = 0, seed: int = 0
) -> DataLoader:
    """Padded tensors of `pieces`, in their order.

    The loader has a generator of its own: drawing batches never touches the random numbers of the model.
    """
    return DataLoader(
        dataset,
        batch_sampler=(piece.tolist() for piece in pieces),
        collate_fn=collator,
        num_workers=num_workers,
        worker_init_fn=quiet_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )


def split_micro_batches(window: Window, size: int | None) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of `window`, cut to at most `size` samples where memory was too short for more."""
    if size is None:
        return window.micro_batches
    pieces = []
    for micro_batch in window.micro_batches:
        counts = micro_batch.get("num_windows", torch.ones(len(micro_batch["labels"]), dtype=torch.int64))
        windows = [int(piece.sum()) for piece in counts.split(size)]
        cuts = {n: tensor.split(size if n in PER_SAMPLE else windows) for n, tensor in micro_batch.items()}
        pieces += [dict(zip(cuts, values, strict=True)) for values in zip(*cuts.values(), strict=True)]
    return pieces


def training_windows(
    dataset: Any,
    batches: Sequence[Indices],
    micro_batch_size: int,
    rank: int,
    world_size: int,
    collator: Collator,
    num_workers: int = 0,
    weights: np.ndarray | None = None,
) -> Iterator[Window]:
    """One window per global batch of `batches`, holding the slice of this process.

    `weights` holds a float32 for each sample of `dataset`; None: all weigh 1. Every process knows those of the whole step.
    A process whose slice is empty gets the first sample of the batch with weight 0: it must still run forward and
    backward, because the other processes wait for its gradients.
    """
    plans = [micro_batches(rank_slice(batch, rank, world_size), micro_batch_size) for batch in batches]
    pieces = [piece if len(piece) else batch[:1] for batch, plan in zip(batches, plans, strict=True) for piece in plan]
    loader = iter(build_loader(dataset, pieces, collator, num_workers))
    weights = np.ones(len(dataset), dtype=np.float32) if weights is None else weights
    for batch, plan in zip(batches, plans, strict=True):
        window = []
        for piece in plan:
            tensors = next(loader)
            tensors["sample_weight"] = torch.from_numpy(weights[piece]) if len(piece) else torch.zeros(1)
            window.append(tensors)
        yield Window(window, len(batch), float(weights[batch].sum(dtype=np.float64)))
