"""A stream of rows answered by one process or several, given back in input order, each row once."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from lib.data.batching import chunked, sort_by_length
from lib.errors import UserError
from lib.inference.inputs import Row
from lib.runtime.seeds import seed_everything

Answer = dict[str, Any]
Predict = Callable[[list[Row]], list[Answer]]
"""Answers to a batch of rows, one each, in their order."""

CHUNK = 100
"""Batches that are read, sorted by length and answered together."""


def answer_rows(
    accelerator: Accelerator, rows: Iterator[Row], predict: Predict, batch_size: int, seed: int
) -> Iterator[tuple[Row, Answer]]:
    """Each row with its answer, in input order, on every process.

    Only the main process reads `rows`, a chunk at a time, so that memory does not grow with their number. Batches
    depend on the texts and the batch size alone, so that any number of processes computes the very same ones. Raises
    UserError, on every process, when `predict` does on one; RuntimeError when a row was answered twice or never.
    """
    for chunk in shared_chunks(accelerator, rows, CHUNK * batch_size):
        lengths = np.array([sum(map(len, row.texts)) for row in chunk])
        # By number and not by positions: what a task makes of a row, such as an answer, may be longer than the row.
        batches = list(enumerate(chunked(sort_by_length(np.arange(len(lengths)), lengths)[::-1], batch_size)))
        answers: list[tuple[int, Answer]] = []
        mistake = None
        try:
            for number, indices in batches[accelerator.process_index :: accelerator.num_processes]:
                seed_everything(seed, chunk[0].number, number)
                with torch.inference_mode(), accelerator.autocast():
                    answers += zip(indices.tolist(), predict([chunk[i] for i in indices]), strict=True)
        except UserError as error:
            mistake = str(error)
        yield from zip(chunk, in_order(gather_answers(accelerator, answers, mistake), len(chunk)), strict=True)


def shared_chunks(accelerator: Accelerator, rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Rows in lists of `size`, read by the main process and sent to the others."""
    while True:
        chunk = list(itertools.islice(rows, size)) if accelerator.is_main_process else []
        chunk = broadcast_object_list([chunk])[0]
        if not chunk:
            return
        yield chunk


def gather_answers(
    accelerator: Accelerator, answers: list[tuple[int, Answer]], mistake: str | None
) -> list[tuple[int, Answer]]:
    """The answers of all processes; raises UserError with the first mistake made on any."""
    parts = [(answers, mistake)]
    if accelerator.num_processes > 1:
        parts = gather_object(parts)
    for _, found in parts:
        if found is not None:
            raise UserError(found)
    return [answer for part, _ in parts for answer in part]


def in_order(answers: list[tuple[int, Answer]], count: int) -> list[Answer]:
    """Answers sorted by their index; raises RuntimeError unless 0..count-1 are there once each."""
    answers = sorted(answers, key=lambda item: item[0])
    if [index for index, _ in answers] != list(range(count)):
        raise RuntimeError(f"{count} rows were read together, but answered were {[index for index, _ in answers][:10]}")
    return [answer for _, answer in answers]
