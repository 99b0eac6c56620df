"""A batch without padding: what stands where, and how it is cut."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from lib.config.sections import ModelSource
from lib.data.batching import packed_batches
from lib.data.loader import MicroBatch, WindowCollator, build_loader
from lib.data.packing import pack
from lib.model.load import load_tokenizer

LENGTHS = [3, 1, 5, 2, 4]


def samples(windows: list[int] | None = None) -> Dataset:
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 40, length).tolist() for length in LENGTHS]
    labels = [
        [float(i), 0.0, 1.0, 0.0, float(i)] for i in range(len(ids))
    ]  # as many labels as the longest text has tokens
    if windows is None:
        return Dataset.from_dict({"input_ids": ids, "labels": labels})
    return Dataset.from_dict(
        {
            "input_ids": [[row] * n for row, n in zip(ids, windows, strict=True)],
            "num_windows": windows,
            "labels": labels,
        }
    )


@pytest.mark.parametrize("windows", [None, [1, 3, 2, 1, 2]])
def test_micro_batches_in_one_row_are_cut_like_padded_ones(roberta: Path, windows: list[int] | None) -> None:
    """Each piece is the row that its own samples make, within the tokens allowed."""
    tokenizer, data = load_tokenizer(ModelSource(str(roberta))), samples(windows)
    everything = [np.arange(len(LENGTHS))]
    padded = next(iter(build_loader(data, everything, WindowCollator(tokenizer))))
    row = next(iter(build_loader(data, everything, WindowCollator(tokenizer, packed=True))))
    assert torch.equal(row["labels"], padded["labels"])
    whole = MicroBatch.build(row, torch.arange(5.0))
    assert whole.positions == sum(n * c for n, c in zip(LENGTHS, windows or [1] * 5, strict=True))
    seen = []
    for most in (1, 4, 7, 9, 100):
        pieces = whole.split(most)
        assert torch.equal(torch.cat([piece.labels for piece in pieces]), row["labels"])
        start = 0
        for piece in pieces:
            assert piece.positions <= most or len(piece) == 1
            part = [np.arange(start, start + len(piece))]
            wanted = pack(next(iter(build_loader(data, part, WindowCollator(tokenizer)))))
            assert piece.inputs.keys() == wanted.keys() - {"labels"}
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in piece.inputs.items())
            start += len(piece)
        seen.append(len(pieces))
    assert seen[0] == 5 > seen[2] > seen[-1] == 1


def test_pieces_of_a_pinned_row_are_pinned(roberta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU: page-locked memory is that of the tensors that were asked to be, and of their parts."""
    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: t.untyped_storage().data_ptr() in pinned)
    collator = WindowCollator(load_tokenizer(ModelSource(str(roberta))), packed=True)
    row = next(iter(build_loader(samples(), [np.arange(len(LENGTHS))], collator)))
    pieces = MicroBatch.build(row, torch.ones(5)).split(7)
    assert not any(tensor.is_pinned() for piece in pieces for tensor in piece.inputs.values())
    whole = MicroBatch.build({name: tensor.pin_memory() for name, tensor in row.items()}, torch.ones(5))
    assert len(pieces := whole.split(7)) > 1
    assert all(tensor.is_pinned() for piece in pieces for tensor in piece.inputs.values())


@pytest.mark.parametrize("tokens", [1, 7, 64, 10_000])
def test_packed_batches_hold_every_text_once_and_are_full(tokens: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 60, rng.integers(1, 90))
        batches = packed_batches(lengths, tokens)
        order = np.concatenate(batches)
        assert sorted(order) == list(range(len(lengths)))
        assert (np.diff(lengths[order]) <= 0).all()
        for batch, following in itertools.pairwise(batches):
            assert len(batch) == 1 or lengths[batch].sum() <= tokens
            assert lengths[batch].sum() + lengths[following[0]] > tokens
        assert len(batches[-1]) == 1 or lengths[batches[-1]].sum() <= tokens
