"""Batches as padded tensors: of every optimizer step in training, of every split in evaluation."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lib.data.batching import ROUNDED, Indices, micro_batches, rank_slice, sort_by_length
from lib.data.load import Data
from lib.data.packing import cut, is_packed, pack
from lib.errors import UserError, first_line
from lib.runtime.precision import DTYPES, TENSOR_CORES
from lib.runtime.signals import quiet_worker

Tensors = dict[str, torch.Tensor]
Collator = Callable[[list[dict[str, Any]]], Tensors]

PER_SAMPLE = ("labels", "num_windows")
"""Columns with one value per sample; all others have one per window, of which a long text may have several."""

COUNTS = ("num_windows", "row_lengths")
"""What is read on the CPU, without waiting for a GPU."""

WITHOUT_WORKERS = "it works without workers, and gives the same numbers: --dataloader_num_workers 0"


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass.

    `inputs` is what `compute_logits` takes, `labels` has a row per sample, `weights` (samples,) holds a float32 for
    each, 0.0 for a stand-in sample.
    """

    inputs: Tensors
    labels: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def build(cls, tensors: Tensors, weights: torch.Tensor) -> "MicroBatch":
        """From the output of a collator."""
        return cls({n: tensor for n, tensor in tensors.items() if n != "labels"}, tensors["labels"], weights)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "MicroBatch":
        labels, weights = (tensor.to(device, non_blocking=True) for tensor in (self.labels, self.weights))
        return MicroBatch(to_device(self.inputs, device), labels, weights)

    @property
    def windows(self) -> list[int]:
        """The rows of `inputs` that each sample takes."""
        counts = self.inputs.get("num_windows")
        return [1] * len(self) if counts is None else counts.tolist()

    @property
    def row_positions(self) -> list[int]:
        """The positions of each row: the padded length, or without padding the row's own."""
        if is_packed(self.inputs):
            return self.inputs["row_lengths"].tolist()
        return [self.inputs["input_ids"].shape[1]] * sum(self.windows)

    @property
    def positions(self) -> int:
        """The positions of all rows: what memory grows with."""
        return sum(self.row_positions)

    def split(self, positions: int) -> list["MicroBatch"]:
        """The same samples in pieces of at most `positions`, and of one sample at least."""
        windows, of_rows = self.windows, iter(self.row_positions)
        sizes, used = [0], 0
        for count in windows:
            taken = sum(itertools.islice(of_rows, count))
            if sizes[-1] and used + taken > positions:
                sizes, used = [*sizes, 0], 0
            sizes[-1], used = sizes[-1] + 1, used + taken
        if len(sizes) == 1:
            return [self]
        ends = np.cumsum([0, *sizes])
        by_row = [sum(windows[start:end]) for start, end in itertools.pairwise(ends)]
        by_sample = {n: tensor.split(sizes) for n, tensor in self.inputs.items() if n in PER_SAMPLE}
        if is_packed(self.inputs):
            rows = cut(self.inputs, by_row)
        else:
            cuts = {n: tensor.split(by_row) for n, tensor in self.inputs.items() if n not in PER_SAMPLE}
            rows = [dict(zip(cuts, values, strict=True)) for values in zip(*cuts.values(), strict=True)]
        pieces = [own | {n: parts[i] for n, parts in by_sample.items()} for i, own in enumerate(rows)]
        return list(map(MicroBatch, pieces, self.labels.split(sizes), self.weights.split(sizes)))


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """All that one process computes for one optimizer step.

    `num_samples` counts the samples of the step over all processes, `weight` is the sum of their weights.
    """

    micro_batches: list[MicroBatch]
    num_samples: int
    weight: float

    def pieces(self, positions: int | None) -> list[MicroBatch]:
        """The micro-batches, cut to at most `positions` each where a number is given."""
        if positions is None:
            return self.micro_batches
        return [piece for micro_batch in self.micro_batches for piece in micro_batch.split(positions)]


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of each batch that one process computes, in micro-batches of at most `micro_batch_size` samples."""

    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def of(self, batch: Indices) -> list[Indices]:
        return micro_batches(rank_slice(batch, self.rank, self.world_size), self.micro_batch_size)


@dataclasses.dataclass(frozen=True)
class Split:
    """One split as evaluation reads it: `tokens` with a column `labels`, and the positions each text takes in a batch.

    `unpadded`: the model must not see padding, see `compute_logits`; `packed`: texts stand in one row, see `pack`.
    """

    name: str
    tokens: Any
    positions: np.ndarray
    collator: Collator
    num_outputs: int
    problem_type: str
    unpadded: bool = False
    packed: bool = False


@dataclasses.dataclass(frozen=True)
class Batches:
    """Data and collator; `weights` holds a float32 for each training sample, None: all weigh 1.

    `unpadded`: evaluation must show the model no padding. `packed`: the texts of a batch stand in one row, see `pack`.
    """

    data: Data
    collator: Collator
    weights: np.ndarray | None = None
    unpadded: bool = False
    packed: bool = False

    @property
    def collate(self) -> Collator:
        """The collator that makes batches in the form that was chosen."""
        if not self.packed:
            return self.collator
        assert isinstance(self.collator, WindowCollator)
        return dataclasses.replace(self.collator, packed=True)

    def split(self, name: str) -> Split:
        data, outputs = self.data, len(self.data.label_names)
        positions = data.lengths[name] if self.packed else data.positions(name)
        problem = data.problem_type
        return Split(name, data.tokens[name], positions, self.collate, outputs, problem, self.unpadded, self.packed)

    def longest(self, size: int) -> StepBatch:
        """The `size` longest training samples as one micro-batch, on every process; all weigh 1."""
        lengths = self.data.lengths["train"]
        indices = sort_by_length(np.arange(len(lengths)), lengths)[::-1][:size]
        tensors = next(iter(build_loader(self.data.tokens["train"], [indices], self.collate)))
        return StepBatch([MicroBatch.build(tensors, torch.ones(len(indices)))], len(indices), float(len(indices)))

    def steps(self, batches: Sequence[Indices], share: Share, num_workers: int = 0) -> Iterator[StepBatch]:
        """A StepBatch for each global batch of training samples, holding the share of this process; see `load` for errors.

        A process whose share is empty gets the first sample of the batch with weight 0: it must still run forward and
        backward, because the other processes wait for its gradients.
        """
        tokens = self.data.tokens["train"]
        shares = [share.of(batch) for batch in batches]
        pieces = [
            part if len(part) else batch[:1] for batch, parts in zip(batches, shares, strict=True) for part in parts
        ]
        loader = load(tokens, pieces, self.collate, num_workers)
        weights = np.ones(len(tokens), dtype=np.float32) if self.weights is None else self.weights
        for batch, parts in zip(batches, shares, strict=True):
            made = [
                MicroBatch.build(next(loader), torch.from_numpy(weights[part]) if len(part) else torch.zeros(1))
                for part in parts
            ]
            yield StepBatch(made, len(batch), float(weights[batch].sum(dtype=np.float64)))


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    """The tensors on `device`, except COUNTS."""
    return {n: t if n in COUNTS else t.to(device, non_blocking=True) for n, t in tensors.items()}


@dataclasses.dataclass
class WindowCollator(DataCollatorWithPadding):
    """Pads a batch; samples with `num_windows` become one row per window.

    Only batches of ROUNDED tokens or more are padded to `pad_to_multiple_of`. `pinned`: batches are put into page-locked
    memory, from where a GPU copies them while the CPU goes on. `packed`: rows stand one after the other, see `pack`.
    """

    pinned: bool = False
    packed: bool = False

    def __call__(self, features: Any) -> Any:
        batch = self.padded(features)
        return pack(batch) if self.packed else batch

    def padded(self, features: Any) -> Any:
        """The samples as padded tensors."""
        if isinstance(features, dict):
            return self.pad(features)
        if "num_windows" not in features[0]:
            short = max(len(sample["input_ids"]) for sample in features) < ROUNDED
            multiple = None if short else self.pad_to_multiple_of
            return DataCollatorWithPadding(self.tokenizer, self.padding, self.max_length, multiple)(features)
        names = [name for name in features[0] if name not in PER_SAMPLE]
        rows = [{name: sample[name][i] for name in names} for sample in features for i in range(sample["num_windows"])]
        batch = self.padded(rows)
        for name in PER_SAMPLE:
            batch[name] = torch.tensor([sample[name] for sample in features])
        return batch

    def pad(self, columns: dict[str, list[Any]]) -> Tensors:
        """The same for columns of `FlatTokens`: what `tokenizer.pad` returns, without a Python object for each token."""
        lengths = np.array([len(row) for row in columns["input_ids"]])
        longest = int(lengths.max())
        if self.padding == "max_length":
            longest = self.max_length or longest
        elif longest >= ROUNDED and self.pad_to_multiple_of:
            longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        positions = np.arange(longest)
        left = self.tokenizer.padding_side == "left"
        mask = positions >= longest - lengths[:, None] if left else positions < lengths[:, None]
        batch = {name: torch.tensor(values) for name, values in columns.items() if name not in TOKENS}
        for name in TOKENS.keys() & columns.keys():
            padded = np.full(mask.shape, getattr(self.tokenizer, TOKENS[name]), dtype=np.int64)
            padded[mask] = np.concatenate(columns[name])
            batch[name] = torch.from_numpy(padded)
        if "attention_mask" in self.tokenizer.model_input_names:
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch


TOKENS = {"input_ids": "pad_token_id", "token_type_ids": "pad_token_type_id"}
"""Columns with a value per token, and the attribute of a tokenizer that they are padded with."""


class FlatTokens:
    """A table whose lists, of tokens and of several labels, are views of its memory, which is mapped to its file."""

    def __init__(self, dataset: Dataset) -> None:
        columns = {name: dataset.data.column(name) for name in dataset.column_names}
        self.chunks = {
            name: [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks]
            for name, column in columns.items()
            if isinstance(dataset.features[name], List)
        }
        self.starts = np.cumsum([0, *map(len, columns["input_ids"].chunks)])
        self.others = {name: column.to_numpy() for name, column in columns.items() if name not in self.chunks}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitems__(self, indices: list[int]) -> dict[str, list[Any]]:
        """The columns of some rows."""
        places = np.searchsorted(self.starts, indices, side="right") - 1
        found = list(zip(places.tolist(), (indices - self.starts[places]).tolist(), strict=True))
        columns: dict[str, list[Any]] = {name: column[indices].tolist() for name, column in self.others.items()}
        for name, chunks in self.chunks.items():
            rows = [chunks[c][1][chunks[c][0][row] : chunks[c][0][row + 1]] for c, row in found]
            columns[name] = rows if name in TOKENS else [row.tolist() for row in rows]
        return columns

    @staticmethod
    def fits(dataset: Any, collator: Any) -> bool:
        """Whether `dataset` is such a table, and `collator` pads with a tokenizer that has no way of its own."""
        if not (isinstance(dataset, Dataset) and isinstance(collator, WindowCollator) and len(dataset)):
            return False
        kind, features = type(collator.tokenizer), dataset.features
        plain = all(getattr(kind, name, 0) is getattr(PreTrainedTokenizerBase, name) for name in ("pad", "_pad"))
        lists = {name for name in features if isinstance(features[name], List)}
        flat = {name for name in lists if isinstance(features[name].feature, Value)}
        known = lists == flat <= TOKENS.keys() | {"labels"}
        return plain and dataset._indices is None and "input_ids" in lists and known


def build_collator(
    tokenizer: Any, mixed_precision: str, device: torch.device, length: int | None = None
) -> WindowCollator:
    """Pads a batch to its longest text, a long one to a multiple of 8 for tensor cores; or to a fixed `length`."""
    pinned = device.type == "cuda"  # of this run: a GPU that is visible and not used would get a context
    if length is not None:
        return WindowCollator(tokenizer, padding="max_length", max_length=length, pinned=pinned)
    tensor_cores = pinned and mixed_precision in DTYPES and torch.cuda.get_device_capability(device) >= TENSOR_CORES
    return WindowCollator(tokenizer, pad_to_multiple_of=8 if tensor_cores else None, pinned=pinned)


def load(dataset: Any, pieces: Sequence[Indices], collator: Collator, num_workers: int) -> Iterator[Tensors]:
    """Padded tensors of `pieces`, in their order, made by `num_workers` processes, or by this one if there are none.

    Raises UserError if the processes cannot be started, or one of them is lost.
    """
    if num_workers == 0:
        yield from build_loader(dataset, pieces, collator)
        return
    try:
        for arrays in build_loader(dataset, pieces, functools.partial(as_arrays, collator), num_workers):
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            yield {n: t.pin_memory() for n, t in tensors.items()} if is_pinned(collator) else tensors
    except RuntimeError as error:
        if lost := lost_worker(error):
            raise UserError(lost) from error
        raise
    except OSError as error:
        if str(error).startswith("Caught "):  # by a worker, which runs
            raise
        raise UserError(
            f"a worker of the data loader cannot be started or heard: {error}; {WITHOUT_WORKERS}"
        ) from error


def is_pinned(collator: Callable[..., Any]) -> bool:
    return getattr(collator, "pinned", False)


def as_arrays(collator: Collator, samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """A batch as arrays, which a worker sends through a pipe.

    Tensors would need room in /dev/shm, a socket below TMPDIR and open files for each batch: a worker that lacks one of
    them loses the batch, and the process that waits for it waits for ever.
    """
    return {name: tensor.numpy() for name, tensor in collator(samples).items()}


def lost_worker(error: Exception) -> str | None:
    """What an error says of a worker that ended, which PyTorch may raise anywhere in the process that waits for it."""
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker"):
        return None
    return f"{first_line(error)}. The system ends a process when memory runs out, here or in its container; {WITHOUT_WORKERS}"


def build_loader(
    dataset: Any, pieces: Sequence[Indices], collator: Callable[..., Any], num_workers: int = 0, seed: int = 0
) -> DataLoader:
    """Padded tensors of `pieces`, in their order.

    The loader has a generator of its own: drawing batches never touches the random numbers of the model.
    """
    if num_workers == 0 and FlatTokens.fits(dataset, collator):  # a worker would be sent the tokens, not the file
        dataset = FlatTokens(dataset)
    return DataLoader(
        dataset,
        batch_sampler=(piece.tolist() for piece in pieces),
        collate_fn=collator,
        num_workers=num_workers,
        # Of a server that forks (Python's default from 3.14 on) a worker would be no child of this process, see `quiet_worker`.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        worker_init_fn=quiet_worker,
        pin_memory=is_pinned(collator),
        generator=torch.Generator().manual_seed(seed),
    )
