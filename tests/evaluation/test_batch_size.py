"""How much an evaluation computes at once: by samples or by positions, the same on all processes and in equal runs."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from lib.config.sections import CLASSIFICATION, ModelSource
from lib.data.loader import Split, WindowCollator
from lib.errors import UserError
from lib.evaluation import scoring
from lib.evaluation.batch_size import POSITIONS, BatchSize, choose_size, split_batches
from lib.evaluation.scoring import predict
from lib.model.load import load_tokenizer
from lib.runtime import segments
from tests.tiny_models import SETTINGS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def build(kind: str = "roberta") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SETTINGS[kind], num_labels=3)
    return AutoModelForSequenceClassification.from_config(config)


def build_split(folder: Path, count: int = 40, packed: bool = False) -> Split:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, count)
    ids = [rng.integers(5, 60, length).tolist() for length in lengths]
    tokens = Dataset.from_dict({"input_ids": ids, "labels": rng.integers(0, 3, count).tolist()})
    collator = WindowCollator(load_tokenizer(ModelSource(str(folder))), packed=packed)
    return Split("validation", tokens, lengths, collator, 3, CLASSIFICATION, packed=packed)


def test_samples_are_counted_on_a_cpu_and_positions_on_a_gpu_unless_the_flag_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_size(None, CPU) == BatchSize(64)
    gpu = torch.device("cuda")
    assert choose_size(None, gpu) == BatchSize(POSITIONS, "positions")
    for of_run in (BatchSize(4096, "positions"), BatchSize(32)):
        assert choose_size(None, gpu, of_run) == of_run
        assert choose_size(None, CPU, of_run) == BatchSize(64)
        assert choose_size(7, gpu, of_run) == BatchSize(7)
    for device in (CPU, gpu):
        assert choose_size(7, device) == BatchSize(7)


@pytest.mark.parametrize("packed", [False, True])
def test_batches_of_positions_hold_every_text_once_and_no_more_than_that(packed: bool) -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        lengths, size = rng.integers(1, 80, rng.integers(1, 200)), BatchSize(int(rng.integers(1, 3000)), "positions")
        batches = size.batches(lengths, packed)
        assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
        for batch in batches:
            taken = lengths[batch].sum() if packed else lengths[batch].max() * len(batch)
            assert len(batch) == 1 or taken <= size.number


def test_batches_of_samples_have_the_positions_of_as_many_of_the_longest() -> None:
    """At most 20 positions, the longest first; a batch that is a quarter full ends at a text of less than 92 % of its longest."""
    lengths = np.array([3, 10, 6, 3, 2, 10, 5, 3, 10, 3])
    found = BatchSize(2).batches(lengths)
    assert [batch.tolist() for batch in found] == [[8, 5], [1], [2], [6], [9, 7, 3, 0], [4]]
    found = BatchSize(2).batches(lengths, packed=True)
    assert [batch.tolist() for batch in found] == [[8, 5], [1, 2], [6, 9, 7, 3, 0, 4]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("unit", ["samples", "positions"])
def test_halving_ends_where_a_single_text_is_too_much(unit: str, packed: bool) -> None:
    """What is halved is what was computed, not the limit, which may be far above it."""
    lengths = np.random.default_rng(0).integers(10, 40, 20)
    size, sizes = BatchSize(10**6, unit), [10**6]
    while size.number > 1 and (unit == "samples" or max(map(len, size.batches(lengths, packed))) > 1):
        size = size.halved(lengths, packed)
        sizes.append(size.number)
    taken = len(lengths) if unit == "samples" else lengths.sum() if packed else 0
    assert sizes[1] == taken // 2 or not taken
    assert all(a >= 2 * b for a, b in itertools.pairwise(sizes))
    with pytest.raises(UserError, match="single sample"):
        size.halved(lengths, packed)


@pytest.mark.parametrize("packed", [False, True])
def test_out_of_memory_halves_the_positions_and_every_sample_is_scored(
    accelerator: Accelerator, roberta: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    model, split = build(), build_split(roberta, packed=packed)
    if packed:
        model.config._attn_implementation = segments.NAME
    wanted = predict(accelerator, model, split, BatchSize(4))
    compute, most = scoring.predict_batch, 300

    def short_of_memory(model: Any, batch: dict[str, torch.Tensor], *rest: Any) -> torch.Tensor:
        if batch["input_ids"].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(model, batch, *rest)

    monkeypatch.setattr(scoring, "predict_batch", short_of_memory)
    found = predict(accelerator, model, split, choose_size(None, torch.device("cuda")))
    assert found.batch_size is not None
    assert found.batch_size.unit == "positions"
    taken = [split.positions[batch] for batch in split_batches(split, found.batch_size)]
    assert max(part.sum() if packed else part.max() * len(part) for part in taken) <= most
    assert most / 2 <= found.batch_size.number < POSITIONS
    assert np.allclose(found.logits, wanted.logits, atol=1e-5)
    assert np.array_equal(predict(accelerator, model, split, found.batch_size).logits, found.logits)


def test_memory_that_is_too_short_for_the_places_of_the_samples_halves_the_batches(
    accelerator: Accelerator, roberta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an error of one process alone, for which the others would wait."""
    model, split = build(), build_split(roberta)
    wanted, place, calls = predict(accelerator, model, split, BatchSize(2)), scoring.place_once, []

    def short_at_first(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return place(*given)

    monkeypatch.setattr(scoring, "place_once", short_at_first)
    found = predict(accelerator, model, split, BatchSize(4))
    assert found.batch_size == BatchSize(2)
    assert np.array_equal(found.logits, wanted.logits)
    assert len(calls) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_any_number_of_processes_computes_the_same_batches(roberta: Path, packed: bool) -> None:
    """A batch is one process's whole, so that its numbers are those of one process, bit by bit."""
    split, size = build_split(roberta, 100, packed), BatchSize(500, "positions")
    batches = split_batches(split, size)
    for world in (2, 3, 8):
        shares = [batches[rank::world] for rank in range(world)]
        assert sorted(tuple(b) for share in shares for b in share) == sorted(tuple(b) for b in batches)


class Reads(TorchDispatchMode):
    """Counts what a host waits for on a GPU: numbers that are read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_no_batch_of_an_evaluation_waits_for_a_number(accelerator: Accelerator, roberta: Path, packed: bool) -> None:
    """As many batches as there may be: nothing is read for one of them beyond what the model's own forward reads."""
    model, split = build(), build_split(roberta, packed=packed)
    if packed:
        model.config._attn_implementation = segments.NAME
    counts = []
    for number in (100, 400):
        size = BatchSize(number, "positions")
        with Reads() as all_reads:
            predict(accelerator, model, split, size)
        with Reads() as own, torch.inference_mode():
            for batch in split_batches(split, size) if not packed else ():
                model(
                    **{n: t for n, t in split.collator([split.tokens[int(i)] for i in batch]).items() if n != "labels"}
                )
        counts.append((all_reads.count, own.count))
    assert all(count <= own for count, own in counts)
