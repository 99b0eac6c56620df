"""Batches as padded tensors: the window of each optimizer step, cut into micro-batches."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from lib.data.batching import Indices, micro_batches, rank_slice
from lib.runtime.signals import quiet_worker

Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]

PER_SAMPLE = ("labels", "sample_weight", "num_windows")
"""What a batch holds once a sample; all else it holds once a window, of which a long text may have several."""


@dataclasses.dataclass(frozen=True)
class Window:
    """All that one process computes for one optimizer step.

    `micro_batches` holds padded tensors and, under `sample_weight`, the weight of each sample, 0.0 for a stand-in;
    `num_samples` counts the samples of the step over all processes, `weight` is the sum of their weights.
    """

    micro_batches: list[dict[str, torch.Tensor]]
    num_samples: int
    weight: float


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
