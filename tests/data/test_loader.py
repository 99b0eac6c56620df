"""The samples of a step, cut into micro-batches."""

import torch

from lib.data.loader import MicroBatch, StepBatch


def micro_batch(labels: torch.Tensor, first: int) -> MicroBatch:
    """Inputs count from `first` on, two for each sample."""
    size = len(labels)
    return MicroBatch({"input_ids": first + torch.arange(2 * size).view(size, 2)}, labels, torch.ones(size))


def test_cut_micro_batches_hold_every_sample_once_in_order():
    micro = [micro_batch(torch.arange(5), 0), micro_batch(torch.arange(5, 7), 10)]
    batch = StepBatch(micro, 7, 7.0)
    pieces = batch.pieces(2)
    assert list(map(len, pieces)) == [2, 2, 1, 2]
    assert torch.cat([piece.labels for piece in pieces]).tolist() == list(range(7))
    assert torch.cat([piece.inputs["input_ids"] for piece in pieces]).flatten().tolist() == list(range(14))
    assert batch.pieces(None) is micro


def test_micro_batches_with_several_labels_per_sample_are_cut_by_sample():
    batch = StepBatch([micro_batch(torch.zeros(5, 3), 0)], 5, 5.0)
    assert [len(piece.inputs["input_ids"]) for piece in batch.pieces(2)] == [2, 2, 1]
