"""Batches: every sample once, in an order fixed by seed and epoch, split evenly over processes, with little padding."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from lib.config.sections import DataConfig, ModelConfig
from lib.config.train import TrainingConfig
from lib.data.batching import (
    epoch_batches,
    grouped_batches,
    micro_batches,
    padding_share,
    permutation,
    rank_slice,
)
from lib.data.load import Data, load_data
from lib.data.loader import Share, StepBatch, build_collator
from lib.model.load import load_tokenizer
from lib.run.record import padding_shares
from tests.stepping import batches_of

SIZES = range(1, 41)
STRATEGIES = ("random", "group_by_length")
WORLD_SIZES = (1, 2, 3, 4)


def skewed_lengths(size: int, seed: int = 0) -> np.ndarray:
    """Many short texts and a few long ones, as in real data."""
    return 3 + np.random.default_rng(seed).exponential(12, size).astype(np.int64)


@pytest.fixture(scope="module")
def movie_review_lengths() -> np.ndarray:
    """Tokens of each training text of movie_reviews by the tokenizer of minilm."""
    tokenizer = load_tokenizer(ModelConfig(model="minilm"))
    data = load_data(DataConfig(dataset="movie_reviews"), tokenizer, ("train",))
    return data.lengths["train"]


def flat(batches: list[np.ndarray]) -> list[int]:
    return [int(index) for batch in batches for index in batch]


class Padder:
    """The part of a tokenizer that the collator uses."""

    pad_token_id, model_input_names, padding_side = 0, ["input_ids", "attention_mask"], "right"

    def pad(self, rows: list[dict], **_: object) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor([row["labels"] for row in rows])}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return Padder().pad(rows)


def numbered_dataset(lengths: np.ndarray) -> Dataset:
    """Sample i holds the token i + 1 repeated, so that a batch tells which samples it holds."""
    rows = [[index + 1] * int(length) for index, length in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": rows, "labels": list(range(len(rows)))})


def steps_of_all_ranks(
    size: int, batch_size: int, micro_batch_size: int, world_size: int
) -> list[tuple[StepBatch, ...]]:
    """For each step, the shares of all processes."""
    lengths = skewed_lengths(size)
    dataset, batches = numbered_dataset(lengths), epoch_batches(lengths, batch_size, seed=3, epoch=0)
    ranks = [
        batches_of(dataset, collate).steps(batches, Share(micro_batch_size, rank, world_size))
        for rank in range(world_size)
    ]
    return list(zip(*ranks, strict=True))


def counted_samples(shares: tuple[StepBatch, ...]) -> list[int]:
    """Numbers of the samples with weight 1, over processes and micro-batches."""
    pieces = [piece for share in shares for piece in share.micro_batches]
    return [int(label) for piece in pieces for label in piece.labels[piece.weights == 1]]


# ---------------------------------------------------------------------------------------------------- permutation


def test_permutation_is_the_same_on_every_numpy_version() -> None:
    assert permutation(10, 42, 0, 0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
    assert permutation(10, 42, 1, 0).tolist() == [1, 2, 8, 5, 3, 9, 6, 0, 4, 7]


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_permutation_holds_each_number_once(size: int) -> None:
    assert sorted(permutation(size, 7)) == list(range(size))


def test_permutation_puts_every_number_at_every_place_equally_often() -> None:
    places = np.array([permutation(4, seed) for seed in range(2000)])
    shares = np.stack([(places == number).mean(axis=0) for number in range(4)])
    assert np.abs(shares - 0.25).max() < 0.05


# ---------------------------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 16, 64])
def test_epoch_holds_every_sample_once(strategy: str, batch_size: int) -> None:
    for size in SIZES:
        assert sorted(flat(epoch_batches(skewed_lengths(size), batch_size, 1, 0, strategy))) == list(range(size))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [40, 41, 799, 2001])
def test_all_batches_but_one_are_full(strategy: str, size: int) -> None:
    sizes = sorted(len(batch) for batch in epoch_batches(skewed_lengths(size), 8, 1, 0, strategy))
    assert sizes == sorted([8] * (size // 8) + [size % 8] * (size % 8 > 0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_depends_on_seed_and_epoch_alone(strategy: str) -> None:
    lengths = skewed_lengths(64)
    first = flat(epoch_batches(lengths, 8, 5, 2, strategy))
    np.random.default_rng().random()
    torch.rand(3)
    assert flat(epoch_batches(lengths, 8, 5, 2, strategy)) == first


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_neighboring_seeds_and_epochs_have_different_orders(strategy: str) -> None:
    lengths = skewed_lengths(64)
    orders = {tuple(flat(epoch_batches(lengths, 8, seed, epoch, strategy))) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


def test_group_by_length_avoids_most_of_the_padding() -> None:
    lengths = skewed_lengths(2000)
    grouped, mixed = (padding_share(lengths, epoch_batches(lengths, 16, 1, 0, name)) for name in reversed(STRATEGIES))
    assert mixed > 0.4
    assert grouped < mixed / 5


def test_grouped_batches_are_not_sorted_by_length() -> None:
    lengths = skewed_lengths(800)
    longest = np.array([lengths[batch].max() for batch in epoch_batches(lengths, 16, 1, 0)])
    rises = (np.diff(longest) > 0).mean()
    assert 0.25 < rises < 0.75
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.4


def test_grouped_batches_have_other_members_in_every_epoch() -> None:
    lengths = skewed_lengths(800)
    first, second = ({frozenset(flat([batch])) for batch in epoch_batches(lengths, 8, 1, epoch)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 10


# ---------------------------------------------------------------------------------------------------- ranks and micro-batches


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rank_slices_concatenate_to_the_batch_and_differ_by_one_sample(world_size: int) -> None:
    for size in SIZES:
        batch = permutation(size, 0)
        slices = [rank_slice(batch, rank, world_size) for rank in range(world_size)]
        assert flat(slices) == batch.tolist()
        sizes = [len(part) for part in slices]
        assert max(sizes) - min(sizes) <= 1


def test_micro_batches_concatenate_to_the_part_and_keep_the_limit() -> None:
    for size, limit in itertools.product(range(1, 12), range(1, 13)):
        pieces = micro_batches(np.arange(size), limit)
        assert flat(pieces) == list(range(size))
        assert 0 < max(map(len, pieces)) <= limit


def test_empty_part_is_one_empty_micro_batch() -> None:
    assert [len(piece) for piece in micro_batches(np.arange(0), 4)] == [0]


@pytest.mark.parametrize("positions", [1, 50, 3000])
def test_grouped_batches_hold_every_sample_once_longest_first(positions: int) -> None:
    for size in SIZES:
        lengths = skewed_lengths(size)
        order = flat(grouped_batches(lengths, positions))
        assert sorted(order) == list(range(size))
        assert (np.diff(lengths[order]) <= 0).all()


@pytest.mark.parametrize("samples", [1, 4, 32, 64])
def test_grouped_batches_have_no_more_positions_than_allowed(samples: int) -> None:
    for seed in range(5):
        lengths = skewed_lengths(1000, seed)
        positions = samples * int(lengths.max())
        batches = grouped_batches(lengths, positions)
        assert max(len(batch) * lengths[batch].max() for batch in batches) <= positions
        assert max(map(len, batches)) > samples  # batches of short texts are larger


def test_evaluation_is_less_than_five_percent_padding(movie_review_lengths: np.ndarray) -> None:
    for size in (1000, len(movie_review_lengths)):
        lengths = movie_review_lengths[:size]
        batches = grouped_batches(lengths, 64 * int(lengths.max()))
        assert padding_share(lengths, batches) < 0.05
        assert len(batches) < 1.5 * len(lengths) / 64


def test_training_is_less_than_five_percent_padding(movie_review_lengths: np.ndarray) -> None:
    batches = epoch_batches(movie_review_lengths, 32, seed=0, epoch=0)
    assert padding_share(movie_review_lengths, batches) < 0.05
    assert padding_share(movie_review_lengths, epoch_batches(movie_review_lengths, 32, 0, 0, "random")) > 0.4


def test_text_padded_to_a_fixed_length_takes_whole_windows_of_positions() -> None:
    lengths = {"test": np.array([3, 8, 9, 20])}
    data = Data("x", {}, {}, lengths, [], ("text",), (), max_length=8, pad_to_max_length=True)
    assert data.positions("test").tolist() == [8, 8, 16, 24]  # the longer texts take two and three windows
    assert dataclasses.replace(data, pad_to_max_length=False).positions("test").tolist() == [3, 8, 9, 20]


def test_texts_without_tokens_are_in_grouped_batches() -> None:
    assert flat(grouped_batches(np.zeros(5, dtype=np.int64), 2)) == [4, 3, 2, 1, 0]
    assert grouped_batches(np.zeros(0, dtype=np.int64), 2) == []


# ---------------------------------------------------------------------------------------------------- padding


def test_padding_share_is_the_one_computed_by_hand() -> None:
    lengths = np.array([3, 5, 8, 2])
    pieces = [np.array([0, 1]), np.array([2, 3])]
    assert padding_share(lengths, pieces) == pytest.approx(1 - 18 / (10 + 16))
    assert padding_share(lengths, pieces, multiple=8) == padding_share(lengths, pieces)  # short: not rounded up
    assert padding_share(100 * lengths, pieces, multiple=64) == pytest.approx(1 - 1800 / (2 * 512 + 2 * 832))
    assert padding_share(lengths, [np.array([i]) for i in range(4)]) == 0
    assert padding_share(lengths[:0], []) == 0


def test_padding_shares_of_all_strategies_are_those_computed_by_hand() -> None:
    """Two batches of two: grouped lengths have no padding; a fixed length costs 1 - mean / max_length."""
    lengths = np.array([4, 8, 4, 8])
    data = Data("", {}, {}, {"train": lengths}, [], ("text",), (), max_length=16)
    shares = padding_shares(TrainingConfig(train_batch_size=2, seed=0), data)
    (first, second) = epoch_batches(lengths, 2, 0, 0, "random")
    by_hand = 1 - 24 / (2 * lengths[first].max() + 2 * lengths[second].max())
    assert shares == pytest.approx({"group_by_length": 0.0, "random": by_hand, "pad_to_max_length": 1 - 6 / 16})
    data = dataclasses.replace(data, lengths={"train": np.array([124, 132, 124, 132])}, max_length=256)
    share = padding_shares(TrainingConfig(train_batch_size=2), data, multiple=8)["group_by_length"]
    assert share == pytest.approx(1 - 512 / (248 + 272))


@pytest.mark.parametrize(
    ("device", "precision", "multiple"),
    [("cpu", "bf16", None), ("cuda", "no", None), ("cuda", "bf16", 8), ("cuda", "fp16", 8), ("older", "fp16", None)],
)
def test_only_tensor_cores_pad_to_multiples_of_8(
    device: str, precision: str, multiple: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1) if device == "older" else (7, 5))
    kind = torch.device("cuda" if device == "older" else device)
    assert build_collator(Padder(), precision, kind).pad_to_multiple_of == multiple


@pytest.mark.parametrize(("longest", "padded"), [(17, 17), (127, 127), (128, 128), (129, 136)])
def test_only_long_batches_are_padded_to_a_multiple(
    longest: int, padded: int, roberta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    collator = build_collator(AutoTokenizer.from_pretrained(roberta), "bf16", torch.device("cuda"))
    rows = [{"input_ids": [5] * length, "labels": 0} for length in (3, longest)]
    assert collator(rows)["input_ids"].shape == (2, padded)
    share = padding_share(np.array([3, longest]), [np.array([0, 1])], collator.pad_to_multiple_of)
    assert share == pytest.approx(1 - (3 + longest) / (2 * padded))


def test_pad_to_max_length_gives_one_length_on_every_device(roberta: Path) -> None:
    collator = build_collator(AutoTokenizer.from_pretrained(roberta), "bf16", torch.device("cuda"), 21)
    for texts in ([[0, 2]], [[0, 2], [0] * 21, [0, 5, 2]]):
        batch = collator([{"input_ids": ids, "labels": 0} for ids in texts])
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(texts), 21)
        assert batch["attention_mask"].sum(dim=1).tolist() == [len(ids) for ids in texts]


# ---------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("size", "batch_size", "micro_batch_size"), [(1, 4, 4), (7, 4, 1), (10, 3, 2), (21, 8, 8)])
def test_steps_of_all_ranks_hold_every_sample_once(
    size: int, batch_size: int, micro_batch_size: int, world_size: int
) -> None:
    steps = steps_of_all_ranks(size, batch_size, micro_batch_size, world_size)
    assert sorted(index for shares in steps for index in counted_samples(shares)) == list(range(size))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_weights_of_a_step_sum_to_its_batch_size(world_size: int) -> None:
    lengths = skewed_lengths(10)
    sizes = [len(batch) for batch in epoch_batches(lengths, 4, seed=3, epoch=0)]
    for size, shares in zip(sizes, steps_of_all_ranks(10, 4, 2, world_size), strict=True):
        weights = [piece.weights.sum().item() for share in shares for piece in share.micro_batches]
        assert sum(weights) == size
        assert {share.num_samples for share in shares} == {size}


def test_micro_batches_of_a_step_keep_the_order_of_its_batch() -> None:
    lengths = skewed_lengths(9)
    batches = epoch_batches(lengths, 4, seed=3, epoch=0)
    for micro_batch_size, world_size in itertools.product((1, 2, 3), (1, 2)):
        steps = steps_of_all_ranks(9, 4, micro_batch_size, world_size)
        assert [counted_samples(shares) for shares in steps] == [batch.tolist() for batch in batches]


def test_rank_without_samples_gets_one_sample_of_weight_zero() -> None:
    batch = np.array([2, 0])
    batches = batches_of(numbered_dataset(np.array([4, 5, 6])), collate)
    ranks = [next(batches.steps([batch], Share(4, rank, 3))) for rank in range(3)]
    idle = [share for share in ranks if share.micro_batches[0].weights.sum() == 0]
    assert len(idle) == 1
    assert len(idle[0].micro_batches) == 1
    assert idle[0].micro_batches[0].labels.tolist() == [2]
    assert idle[0].micro_batches[0].weights.tolist() == [0.0]
    assert idle[0].num_samples == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_batches_does_not_change_the_random_state(num_workers: int) -> None:
    lengths = skewed_lengths(6)
    batches = epoch_batches(lengths, 2, seed=0, epoch=0)
    before = torch.get_rng_state()
    steps = list(batches_of(numbered_dataset(lengths), collate).steps(batches, Share(2), num_workers))
    assert [counted_samples((step,)) for step in steps] == [batch.tolist() for batch in batches]
    assert torch.equal(torch.get_rng_state(), before)
