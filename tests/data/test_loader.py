"""The samples of a step, cut into micro-batches; the processes that make batches."""

import multiprocessing
import operator
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import AutoTokenizer

from lib.data.loader import FlatTokens, MicroBatch, StepBatch, build_collator, build_loader, load


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


LABELS = {
    "classes": ([0, 2, 1, 2, 0], Value("int64")),
    "numbers": ([0.1, 2.5, -1.0, 3.3, 0.7], Value("float64")),
    "soft": ([[0.1, 0.9], [0.7, 0.3], [1.0, 0.0], [0.25, 0.75], [1 / 3, 2 / 3]], List(Value("float32"))),
    "several": ([[0.0, 1.0]] * 4 + [[1.0, 1.0]], List(Value("float64"))),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [None, 200])
def test_tokens_in_one_array_become_the_tensors_of_the_tokenizer(labels, side, length, roberta, tmp_path, monkeypatch):
    """Equal in every number and dtype, short and long, in tables of several parts."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    tokenizer = AutoTokenizer.from_pretrained(roberta)
    tokenizer.padding_side, tokenizer._pad_token_type_id = side, 3
    tokens = [list(range(5, 5 + count)) for count in (3, 130, 1, 7, 0)]
    values, kind = LABELS[labels]
    columns = {"input_ids": tokens, "token_type_ids": [[1] * len(row) for row in tokens], "labels": values}
    kinds = {"input_ids": List(Value("int32")), "token_type_ids": List(Value("int8")), "labels": kind}
    parts = [Dataset.from_dict({n: c[a:b] for n, c in columns.items()}, Features(kinds)) for a, b in ((0, 2), (2, 5))]
    dataset = concatenate_datasets(parts)
    assert len(dataset.data.column("input_ids").chunks) == 2
    collator = build_collator(tokenizer, "bf16", torch.device("cuda"), length)
    collator.pinned = False
    assert FlatTokens.fits(dataset, collator)
    pieces = [np.array(piece) for piece in ([4, 1], [0, 2, 3], [3], [0, 1, 2, 3, 4])]
    for batch, piece in zip(build_loader(dataset, pieces, collator), pieces, strict=True):
        plain = collator([dataset[int(index)] for index in piece])
        assert batch.keys() == plain.keys()
        for name, tensor in batch.items():
            assert tensor.dtype == plain[name].dtype, name
            assert torch.equal(tensor, plain[name]), name


def test_what_the_tokenizer_pads_in_its_own_way_is_left_to_it(roberta):
    tokenizer = AutoTokenizer.from_pretrained(roberta)
    collator = build_collator(tokenizer, "no", torch.device("cpu"))
    dataset = Dataset.from_dict({"input_ids": [[5, 6], [7]], "labels": [0, 1]})
    assert FlatTokens.fits(dataset, collator)
    windows = Dataset.from_dict({"input_ids": [[[5, 6]], [[7]]], "num_windows": [1, 1], "labels": [0, 1]})
    others = dataset.add_column("entities", [[1], [2]]), dataset.select([1, 0]), windows, [{"labels": 1}]
    assert not any(FlatTokens.fits(other, collator) for other in others)
    own = type("Own", (type(tokenizer),), {"_pad": lambda *_: None})
    collator.tokenizer.__class__ = own
    assert not FlatTokens.fits(dataset, collator)


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
