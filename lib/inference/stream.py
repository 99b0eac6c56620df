"""Predictions for a stream of examples: on one process or several, each example once, in input order."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from lib.config.sections import EVAL_SAMPLES
from lib.data.batching import Indices, chunked, sort_by_length
from lib.errors import UserError
from lib.inference.inputs import Example
from lib.runtime.seeds import seed_everything

CHUNK = 100
"""Batches whose examples are read and sorted by length together."""

GROUP = 1024
"""Examples that a process reads as tokens together, at most, where it forms the batches by itself."""

Prediction = dict[str, Any]
"""Output fields by name, such as `label` and `probabilities`; text and id of the example are not among them."""

Predict = Callable[[list[Example]], list[Prediction]]
"""Predictions for a batch of examples, one each, in the same order."""


def predict_stream(
    accelerator: Accelerator, examples: Iterator[Example], predict: Predict, batch_size: int | None, seed: int
) -> Iterator[tuple[Example, Prediction]]:
    """Each example with its prediction, in input order, on every process.

    Only the main process reads `examples`, one chunk at a time, so memory does not grow with the input. `predict` gets
    `batch_size` examples at once, which depend on the texts alone: any number of processes computes the same batches, until
    memory is too short for one. With None it forms batches by itself, of an equal share for each process: they depend on
    the number of processes. Raises UserError, on every process, if `predict` does on one of them, and RuntimeError if an
    example was predicted twice or never.
    """
    count = CHUNK * (EVAL_SAMPLES if batch_size is None else batch_size)
    while True:
        chunk = list(itertools.islice(examples, count)) if accelerator.is_main_process else []
        chunk = broadcast_object_list([chunk])[0]
        if not chunk:
            return
        lengths = np.array([sum(map(len, example.texts)) for example in chunk])
        order = sort_by_length(np.arange(len(chunk)), lengths)[::-1]
        groups = deal(order, accelerator.num_processes) if batch_size is None else chunked(order, batch_size)
        results: list[tuple[int, Prediction]] = []
        mistake = None
        try:
            for number, indices in list(enumerate(groups))[accelerator.process_index :: accelerator.num_processes]:
                seed_everything(seed, chunk[0].number, number)
                with torch.inference_mode(), accelerator.autocast():
                    results += zip(indices.tolist(), predict([chunk[i] for i in indices]), strict=True)
        except UserError as error:
            mistake = str(error)
        parts = gather_object([(results, mistake)])
        for _, found in parts:
            if found is not None:
                raise UserError(found)
        gathered = [result for part, _ in parts for result in part]
        yield from zip(chunk, in_input_order(gathered, len(chunk)), strict=True)


def deal(order: Indices, num_processes: int) -> list[Indices]:
    """`order` in groups of at most GROUP, as many for each process, each with texts of all lengths: none has more to do."""
    count = num_processes * -(-len(order) // (num_processes * GROUP))
    return [order[start::count] for start in range(min(count, len(order)))]


def in_input_order(results: list[tuple[int, Prediction]], count: int) -> list[Prediction]:
    """The predictions sorted by index. Raises RuntimeError unless each of 0 … count-1 is there once."""
    results = sorted(results, key=lambda item: item[0])
    found = [index for index, _ in results]
    if found != list(range(count)):
        raise RuntimeError(f"{count} rows were read, but these were predicted: {found[:10]}")
    return [prediction for _, prediction in results]
