"""Each example is predicted once and comes back in input order; no more than a chunk is read ahead."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from lib.config.sections import EVAL_SAMPLES
from lib.errors import UserError
from lib.inference.inputs import Example
from lib.inference.stream import CHUNK, GROUP, deal, in_input_order, predict_stream
from tests.conftest import sentences


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def examples(count: int):
    return (Example(i, i, (text,)) for i, (text, _) in enumerate(sentences(count)))


def echo(batches: list | None = None):
    """A `predict` that gives the text back and appends the numbers of its examples to `batches`."""

    def predict(examples):
        if batches is not None:
            batches.append([example.number for example in examples])
        return [{"words": example.texts[0]} for example in examples]

    return predict


@pytest.mark.parametrize("count", [1, 2, 7, 299, 300, 301, 640])
@pytest.mark.parametrize("batch_size", [1, 3, 64, None])
def test_every_example_is_predicted_once_in_input_order(accelerator, count, batch_size):
    batches: list = []
    found = list(predict_stream(accelerator, examples(count), echo(batches), batch_size, seed=0))
    assert [example.number for example, _ in found] == list(range(count))
    assert all(prediction["words"] == example.texts[0] for example, prediction in found)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(count))
    assert max(map(len, batches)) <= (batch_size or GROUP)


def test_batches_group_texts_by_length(accelerator):
    batches: list = []
    list(predict_stream(accelerator, examples(64), echo(batches), 8, seed=0))
    lengths = [[len(sentences(64)[i][0]) for i in batch] for batch in batches]
    assert all(min(a) >= max(b) for a, b in itertools.pairwise(lengths))


@pytest.mark.parametrize("count", [1, 7, 2000, CHUNK * EVAL_SAMPLES])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_examples_are_dealt_so_that_each_process_has_as_much_to_do(count, processes):
    """Where batches are formed of positions: as many examples for each process, and of each length."""
    order = np.arange(count)[::-1]  # example i has i characters
    groups = deal(order, processes)
    assert sorted(np.concatenate(groups)) == list(range(count))
    assert max(map(len, groups)) <= GROUP
    assert all((np.diff(group) < 0).all() for group in groups)
    shares = [np.concatenate(groups[rank::processes]) for rank in range(min(processes, count))]
    assert max(map(len, shares)) - min(map(len, shares)) <= len(groups) / processes
    if count == 2000:
        assert max(share.sum() for share in shares) < 1.01 * min(share.sum() for share in shares)


def test_as_much_is_read_before_the_first_prediction_where_positions_are_counted(accelerator):
    source = examples(CHUNK * EVAL_SAMPLES + 1)
    next(predict_stream(accelerator, source, echo(), None, seed=0))
    assert len(list(source)) == 1


def test_input_is_read_one_chunk_at_a_time(accelerator):
    """Memory must not grow with the input, which may be endless."""
    read = 0

    def endless():
        nonlocal read
        for read in itertools.count(1):
            yield Example(read - 1, read - 1, ("a film",))

    predictions = predict_stream(accelerator, endless(), echo(), 2, seed=0)
    for wanted in range(3 * 2 * CHUNK):
        example, _ = next(predictions)
        assert example.number == wanted
        assert read <= (wanted // (2 * CHUNK) + 1) * 2 * CHUNK


def test_missing_or_double_prediction_is_an_error(accelerator):
    assert in_input_order([(1, {"b": 1}), (0, {"a": 1})], 2) == [{"a": 1}, {"b": 1}]
    for wrong in ([(0, {})], [(0, {}), (0, {})], [(0, {}), (1, {}), (1, {})]):
        with pytest.raises(RuntimeError, match="2 rows were read"):
            in_input_order(wrong, 2)
    with pytest.raises(ValueError, match="shorter"):
        list(predict_stream(accelerator, examples(3), lambda batch: [{} for _ in batch[1:]], 2, seed=0))


def test_user_error_in_a_batch_reaches_the_user(accelerator):
    def refuse(batch):
        raise UserError(f"row {batch[0].number} has no mask")

    with pytest.raises(UserError, match="has no mask"):
        list(predict_stream(accelerator, examples(3), refuse, 2, seed=0))


def test_random_numbers_depend_on_seed_and_batch_alone(accelerator):
    def draw(batch):
        return [{"number": torch.rand(()).item()} for _ in batch]

    first, again = (list(predict_stream(accelerator, examples(9), draw, 2, seed=1)) for _ in range(2))
    other = list(predict_stream(accelerator, examples(9), draw, 2, seed=2))
    assert first == again != other
    assert len({prediction["number"] for _, prediction in first}) == 9
