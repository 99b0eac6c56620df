"""The samples of a step, cut into micro-batches; the processes that make batches."""

import multiprocessing
import operator
import sys

import numpy as np
import pytest
import torch

from lib.data.loader import MicroBatch, StepBatch, build_collator, build_loader, load


def micro_batch(labels: torch.Tensor, first: int) -> MicroBatch:
    """Inputs count from `first` on, two for each sample."""
    size = len(labels)
    return MicroBatch({"input_ids": first + torch.arange(2 * size).view(size, 2)}, labels, torch.ones(size))


def test_cut_micro_batches_hold_every_sample_once_in_order():
    micro = [micro_batch(torch.arange(5), 0), micro_batch(torch.arange(5, 7), 10)]
    batch = StepBatch(micro, 7, 7.0)
    pieces = batch.pieces(5)  # two samples of two positions
    assert list(map(len, pieces)) == [2, 2, 1, 2]
    assert torch.cat([piece.labels for piece in pieces]).tolist() == list(range(7))
    assert torch.cat([piece.inputs["input_ids"] for piece in pieces]).flatten().tolist() == list(range(14))
    assert batch.pieces(None) is micro
    assert all(map(operator.is_, batch.pieces(10), micro))
    assert list(map(len, batch.pieces(1))) == [1] * 7  # a sample is never cut


def test_micro_batches_with_several_labels_per_sample_are_cut_by_sample():
    batch = StepBatch([micro_batch(torch.zeros(5, 3), 0)], 5, 5.0)
    assert [len(piece.inputs["input_ids"]) for piece in batch.pieces(4)] == [2, 2, 1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("length", [None, 8])
def test_memory_is_pinned_for_the_device_of_the_run_not_for_a_gpu_that_is_visible(device, length, monkeypatch):
    """Pinning makes a context on a GPU, also in a run that computes on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cpu")
    collator = build_collator(None, "no", torch.device(device), length)
    assert build_loader([], [], collator).pin_memory == (device == "cuda")


@pytest.mark.skipif(sys.platform != "linux", reason="workers end with their parent on Linux")
def test_workers_live_where_a_server_would_fork_them() -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        made = list(load([{"labels": 1}, {"labels": 2}], [np.array([0]), np.array([1])], collate, num_workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert [batch["labels"].tolist() for batch in made] == [[1], [2]]


def collate(samples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    return {"labels": torch.tensor([sample["labels"] for sample in samples])}
