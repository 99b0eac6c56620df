"""Rows come back in input order, each once, read no further ahead than a chunk, in batches no layout changes."""

import itertools

import pytest
from accelerate import Accelerator

from lib.errors import UserError
from lib.inference.inputs import Row
from lib.inference.stream import CHUNK, answer_rows, in_order
from tests.conftest import sentences


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def texts(count: int):
    return (Row(i, i, (text,)) for i, (text, _) in enumerate(sentences(count)))


def echo(seen: list | None = None):
    def predict(rows):
        if seen is not None:
            seen.append([row.number for row in rows])
        return [{"words": row.texts[0]} for row in rows]

    return predict


@pytest.mark.parametrize("count", [1, 2, 7, 299, 300, 301, 640])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_row_is_answered_once_in_input_order(accelerator, count, batch_size):
    seen: list = []
    found = list(answer_rows(accelerator, texts(count), echo(seen), batch_size, seed=0))
    assert [row.number for row, _ in found] == list(range(count))
    assert all(answer["words"] == row.texts[0] for row, answer in found)
    assert sorted(itertools.chain.from_iterable(seen)) == list(range(count))
    assert max(map(len, seen)) <= batch_size


def test_texts_of_like_length_are_answered_together(accelerator):
    seen: list = []
    list(answer_rows(accelerator, texts(64), echo(seen), 8, seed=0))
    lengths = [[len(sentences(64)[i][0]) for i in batch] for batch in seen]
    assert all(min(a) >= max(b) for a, b in itertools.pairwise(lengths))


def test_an_input_without_end_is_answered_as_it_comes(accelerator):
    """Memory does not grow with the input: nothing is read beyond the chunk that is being answered."""
    read = 0

    def endless():
        nonlocal read
        for read in itertools.count(1):
            yield Row(read - 1, read - 1, ("a film",))

    answers = answer_rows(accelerator, endless(), echo(), 2, seed=0)
    for wanted in range(3 * 2 * CHUNK):
        row, _ = next(answers)
        assert row.number == wanted
        assert read <= (wanted // (2 * CHUNK) + 1) * 2 * CHUNK


def test_a_row_that_is_missing_or_double_is_noticed(accelerator):
    assert in_order([(1, {"b": 1}), (0, {"a": 1})], 2) == [{"a": 1}, {"b": 1}]
    for wrong in ([(0, {})], [(0, {}), (0, {})], [(0, {}), (1, {}), (1, {})]):
        with pytest.raises(RuntimeError, match="2 rows were read"):
            in_order(wrong, 2)
    with pytest.raises(ValueError, match="shorter"):
        list(answer_rows(accelerator, texts(3), lambda rows: [{} for _ in rows[1:]], 2, seed=0))


def test_a_mistake_in_a_row_reaches_the_user(accelerator):
    def refuse(rows):
        raise UserError(f"row {rows[0].number} has no mask")

    with pytest.raises(UserError, match="has no mask"):
        list(answer_rows(accelerator, texts(3), refuse, 2, seed=0))


def test_random_numbers_belong_to_a_batch_and_not_to_what_was_drawn_before(accelerator):
    import torch

    def draw(rows):
        return [{"number": torch.rand(()).item()} for _ in rows]

    first, again = (list(answer_rows(accelerator, texts(9), draw, 2, seed=1)) for _ in range(2))
    other = list(answer_rows(accelerator, texts(9), draw, 2, seed=2))
    assert first == again != other
    assert len({answer["number"] for _, answer in first}) == 9
